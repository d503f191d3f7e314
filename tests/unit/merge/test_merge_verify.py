"""The proof of a merge: it passes what rounding explains, and fails on anything else."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsft.merge.arithmetic
import dsft.merge.peft_control
import dsft.merge.verify
import dsft.merge.write
from dsft.cli.app import main
from dsft.core.errors import MergeError
from dsft.core.models.weight_files import open_weight_file
from dsft.merge.config import BaseRounding, MergeConfig, OutputDtype
from dsft.merge.events import Notice, Progress
from dsft.merge.run import run_merge
from dsft.merge.setup import MergeSetup
from dsft.merge.verify import compare
from dsft.merge.write import UNPROVED_CONFIG
from tests.merge_kinds import KINDS, PLAIN, Kind
from tests.merge_models import write_base, write_lora
from tests.unit.merge.refusals import change_json, change_weights, look, merge, put

Spoil = Callable[[MergeSetup, Path], None]

DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("rounding", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_right_merge_passes(adapter: Path, dtype: OutputDtype, rounding: BaseRounding) -> None:
    found = merge(adapter, dtype=dtype, base_rounding=rounding, is_verifying=True).verification
    assert found is not None
    steps = {"bfloat16": 2**-9, "float16": 2**-12, "float32": 2**-25}[dtype]
    assert 0 < found.mean_difference < 20 * steps
    assert 0 < found.rounding_mean_difference < 20 * steps
    assert found.excess_mean_difference <= 0.02 * found.rounding_mean_difference
    assert found.mean_difference <= found.max_difference < 200 * steps
    assert 0 < found.mean_kl <= found.max_kl < 200 * steps**2 + 1e-11  # float32's own
    assert found.top_token_agreement > (0.95 if dtype == "bfloat16" else 0.99)


def find_update(setup: MergeSetup, name: str) -> Tensor:
    recipe = next(recipe for recipe in setup.source.plan.recipes if recipe.tensor.name == name)
    merged, before = zip(*(make() for make in setup.source.divide(recipe)), strict=True)
    return torch.cat(merged) - torch.cat(before)


def enlarge_an_update(setup: MergeSetup, folder: Path) -> None:
    """Write one module of one layer with an update that is 2 percent too large."""

    def change(weights: dict[str, Tensor]) -> None:
        weights[QUERY] = (weights[QUERY].float() + 0.02 * find_update(setup, QUERY)).to(weights[QUERY].dtype)

    change_weights(folder / "model.safetensors", change)


def skip_an_update(setup: MergeSetup, folder: Path) -> None:
    """Write one module of one layer as the base has it."""

    def change(weights: dict[str, Tensor]) -> None:
        weights[DOWN] = (weights[DOWN].float() - find_update(setup, DOWN)).to(weights[DOWN].dtype)

    change_weights(folder / "model.safetensors", change)


def swap_layers(setup: MergeSetup, folder: Path) -> None:
    """Write the queries of two layers in each other's place."""

    def change(weights: dict[str, Tensor]) -> None:
        other = QUERY.replace(".0.", ".1.")
        weights[QUERY], weights[other] = weights[other], weights[QUERY]

    change_weights(folder / "model.safetensors", change)


def flip_an_exponent_bit(setup: MergeSetup, folder: Path) -> None:
    """Flip the highest bit of an exponent in the file, as bad memory would."""
    with open_weight_file(folder / "model.safetensors") as weights:
        place = weights.tensors[QUERY].first_byte + weights.dtype(QUERY).itemsize - 1
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x40]))


def write_nan(setup: MergeSetup, folder: Path) -> None:
    """Put NaN in one weight."""
    change_weights(folder / "model.safetensors", put(DOWN, float("nan")))


def drop_rope_scaling(setup: MergeSetup, folder: Path) -> None:
    """Leave the stretched positions out of config.json."""
    content = json.loads((folder / UNPROVED_CONFIG).read_text())
    assert content.pop("rope_parameters")["factor"] == 4
    (folder / UNPROVED_CONFIG).write_text(json.dumps(content))


def say_that_the_head_is_tied(setup: MergeSetup, folder: Path) -> None:
    """Let transformers take the embedding for the head."""
    change_json(folder / UNPROVED_CONFIG, tie_word_embeddings=True)


def spoil_after(monkeypatch: pytest.MonkeyPatch, step: str, spoil: Spoil) -> None:
    """Spoil the unfinished folder after a step of writing."""
    right = getattr(dsft.merge.write, step)

    def write(setup: MergeSetup, folder: Path, *more: Any) -> Any:
        result = right(setup, folder, *more)
        spoil(setup, folder)
        return result

    monkeypatch.setattr(dsft.merge.write, step, write)


@pytest.mark.parametrize(
    ("step", "spoil", "dtype"),
    [
        ("write_weights", enlarge_an_update, "float32"),
        ("write_weights", skip_an_update, "float32"),
        ("write_weights", skip_an_update, "float16"),
        ("write_weights", skip_an_update, "bfloat16"),
        ("write_weights", swap_layers, "bfloat16"),
        ("write_weights", flip_an_exponent_bit, "float32"),
        ("write_weights", flip_an_exponent_bit, "float16"),
        ("write_weights", flip_an_exponent_bit, "bfloat16"),
        ("write_weights", write_nan, "bfloat16"),
        ("write_configuration", drop_rope_scaling, "bfloat16"),
        ("write_configuration", say_that_the_head_is_tied, "bfloat16"),
    ],
)
def test_a_spoilt_model_is_found_out_and_nothing_of_it_is_left(
    step: str,
    spoil: Spoil,
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = write_base(tmp_path / "base", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    write_lora(tmp_path / "adapter", base, PLAIN.settings)
    spoil_after(monkeypatch, step, spoil)
    before = look(tmp_path).keys()
    assert main(["merge", str(tmp_path / "adapter"), "--dtype", dtype, "--quiet"]) == 1
    assert "The merged model does not compute what base and adapter do" in capsys.readouterr().err
    assert look(tmp_path).keys() == before


def test_a_spoilt_model_leaves_the_older_one_as_it_is(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(adapter)
    before = look(adapter / "merged_model")
    spoil_after(monkeypatch, "write_weights", skip_an_update)
    with pytest.raises(MergeError, match="does not compute"):
        merge(adapter, overwrite=True, is_verifying=True)
    assert look(adapter / "merged_model") == before


def test_without_verification_nothing_is_found_out(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_after(monkeypatch, "write_weights", skip_an_update)
    assert merge(adapter).verification is None


def test_a_type_that_ruins_the_model_is_refused(tmp_path: Path) -> None:
    """Two inputs of one direction, whose large weights cancel in float32 and in bfloat16 no more."""
    base = write_base(tmp_path / "base", dtype=torch.float32)

    def cancel(weights: dict[str, Tensor]) -> None:
        for name, factor in (("gate", 1), ("up", 3)):
            rows = weights[f"model.layers.1.mlp.{name}_proj.weight"]
            rows[1] = factor * rows[0]
        large = torch.linspace(-999, 999, 64)
        weights[DOWN][:, 0], weights[DOWN][:, 1] = -3 * large, large

    change_weights(base / "model.safetensors", cancel)
    write_lora(tmp_path / "adapter", base, {"target_modules": ["q_proj"]})
    with pytest.raises(MergeError, match="Rounding to bfloat16 changes the logits by"):
        merge(tmp_path / "adapter", is_verifying=True)
    merge(tmp_path / "adapter", dtype="float32", is_verifying=True)


class Told:
    """Keeps what a merge tells."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.verified: list[tuple[int, int]] = []

    def __call__(self, event: Notice | Progress) -> None:
        if isinstance(event, Notice) and event.level == "warning":
            self.warnings.append(event.text)
        if isinstance(event, Progress) and event.phase == "verify":
            self.verified.append((event.done_bytes, event.total_bytes))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("bfloat16", "Rounding to bfloat16 leaves [0-9]+ % of the adapter's update. Take --dtype float16"),
        ("float16", "Rounding to float16 leaves [0-9]+ % of the adapter's update. Take --dtype float32"),
        ("float32", None),
    ],
)
def test_an_update_that_is_lost_in_rounding_is_told(tmp_path: Path, dtype: OutputDtype, words: str | None) -> None:
    """Weights of about 0.1 have steps of 5e-4 in bfloat16 and 6e-5 in float16; the update is about 5e-7."""
    base = write_base(tmp_path / "base")
    write_lora(tmp_path / "adapter", base, PLAIN.settings, size=3e-4)
    told = Told()
    result = run_merge(MergeConfig(str(tmp_path / "adapter"), dtype=dtype), told)
    assert result.update_kept is not None
    if words is None:
        assert told.warnings == []
        assert result.update_kept == pytest.approx(1, abs=0.01)
    else:
        (warning,) = told.warnings
        assert re.search(words, warning)
        assert result.update_kept < 0.5


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in KINDS
        if kind.name in {"all-linear", "dora", "saved-block", "tied", "tied-saved-head", "resized-tied", "conv1d"}
    ],
    ids=str,
)
def test_progress_comes_to_its_end(kind: Kind, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", kind.family, is_tied=kind.is_tied)
    write_lora(tmp_path / "adapter", base, kind.settings, num_new_tokens=kind.num_new_tokens)
    told = Told()
    run_merge(MergeConfig(str(tmp_path / "adapter")), told)
    done = [done for done, _ in told.verified]
    assert done == sorted(done) and done[0] == 0
    assert {total for _, total in told.verified} == {done[-1]}


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in KINDS
        if kind.name in {"all-linear", "dora", "dora-embedding", "bias-all", "tokens", "tied-lora-both", "conv1d-dora"}
    ],
    ids=str,
)
def test_a_merge_in_small_pieces_is_proved_in_small_pieces(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dsft.merge.arithmetic, dsft.merge.verify, dsft.merge.peft_control):
        monkeypatch.setattr(module, "_PIECE_VALUES", 500)
    base = write_base(tmp_path / "base", kind.family, is_tied=kind.is_tied)
    write_lora(tmp_path / "adapter", base, kind.settings)
    for dtype in ("float32", "bfloat16"):
        found = merge(tmp_path / "adapter", dtype=dtype, overwrite=True, is_verifying=True).verification
        assert found is not None
        assert found.excess_mean_difference <= 0.02 * found.rounding_mean_difference + 1e-6
    assert found.rounding_mean_difference > 1e-4


def test_logits_are_compared_by_every_figure() -> None:
    generator = torch.Generator().manual_seed(0)
    unmerged = torch.randn(200, 50, generator=generator)
    control = unmerged + 0.01 * torch.randn(200, 50, generator=generator)
    merged = control + 0.001 * torch.randn(200, 50, generator=generator)
    merged[150, 7] += 20
    found = compare(unmerged, control, merged)
    assert found.num_tokens == 200
    assert found.max_difference == pytest.approx(float((merged - unmerged).abs().max()))
    assert found.mean_difference == pytest.approx(float((merged - unmerged).abs().mean()))
    assert found.rounding_mean_difference == pytest.approx(float((control - unmerged).abs().mean()))
    assert found.excess_mean_difference == pytest.approx(float((merged - control).abs().mean()))
    divergence = torch.nn.functional.kl_div(
        merged.double().log_softmax(-1), unmerged.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert found.mean_kl == pytest.approx(float(divergence.mean()))
    assert found.max_kl == pytest.approx(float(divergence.max()))
    same = unmerged.argmax(-1) == merged.argmax(-1)
    assert found.top_token_agreement == pytest.approx(float(same.float().mean()))
    assert 0.9 < found.top_token_agreement < 1
