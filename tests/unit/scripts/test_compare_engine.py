"""The script that compares losses of engine and plain path: its data, its arguments, its refusals, its figures."""

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from dsft.core.data.packing import pack_sequences
from dsft.train.batches import EffectiveBatchSampler

SCRIPTS = Path(__file__).parents[3] / "scripts"
LENGTH, NUM_STEPS, SEED = 32, 6, 7


@pytest.fixture(scope="module")
def script():
    """Make the scripts importable for this file alone."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import compare_engine

        yield compare_engine
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def data(script):
    import compare_engine_data

    return compare_engine_data


def side(losses: list[float], **other: Any) -> dict[str, Any]:
    count = len(losses)
    facts = {"validation_losses": [2.0, 1.0], "grad_norms": [1.0] * count}
    return {"losses": losses, "num_tokens": [LENGTH] * count, "num_target_tokens": [9] * count} | facts | other


@pytest.mark.parametrize("packs_a_step", [1, 3])
def test_every_step_of_both_runs_has_the_same_samples(data, packs_a_step):
    lengths = np.random.default_rng(0).integers(2, LENGTH, 400)
    pairs = data.find_pairs(lengths, LENGTH, NUM_STEPS * packs_a_step, SEED)
    assert (lengths[pairs].sum(axis=1) == LENGTH).all()
    assert (lengths[pairs][:, 0] > LENGTH / 2).all()
    chosen = pairs.reshape(-1)
    assert len(set(chosen.tolist())) == len(chosen)

    order = data.order_unpacked(lengths[chosen], LENGTH, packs_a_step, SEED)
    packs = pack_sequences(lengths[chosen], LENGTH, SEED)
    packed_steps = list(EffectiveBatchSampler(len(packs), packs_a_step, SEED))
    unpacked_steps = list(EffectiveBatchSampler(len(chosen), 2 * packs_a_step, SEED))
    assert len(packed_steps) == len(unpacked_steps) == NUM_STEPS
    for of_packs, of_samples in zip(packed_steps, unpacked_steps, strict=True):
        packed = [chosen[index] for pack in of_packs for index in packs[pack]]
        assert [chosen[order[place]] for place in of_samples] == packed


def test_packs_that_are_no_pairs_are_refused(data):
    with pytest.raises(SystemExit, match="no pairs"):
        data.order_unpacked(np.array([8, 8, 8, 8]), LENGTH, 1, SEED)
    with pytest.raises(SystemExit, match="not enough for the last step"):
        data.order_unpacked(np.array([20, 12, 25, 7, 30, 2]), LENGTH, 2, SEED)


def test_too_few_pairs_are_told(data):
    with pytest.raises(SystemExit, match="the data has 1 pairs of samples that fill 32 tokens; 2 are needed"):
        data.find_pairs(np.array([20, 12, 12, 25]), LENGTH, 2, SEED)


def test_sides_differ_in_nothing_but_engine_packing_and_passes(script):
    options = Namespace(model="m", device="cpu", precision="fp32", max_length=LENGTH, lora_r=8, learning_rate=1e-4,
                        seed=SEED, steps=NUM_STEPS, packs_a_step=3, samples_a_pass=2)  # fmt: skip
    files = SimpleNamespace(unpacked="u", packed="p", validation="v")
    sides = script.arguments_of_sides(options, files)
    heads = {name: arguments[:10] for name, arguments in sides.items()}
    micro, passes = "--per-device-train-batch-size", "--gradient-accumulation-steps"
    exact = ["--precision", "fp32"]
    assert heads == {
        "plain": ["--engine", "off", "--dataset", "u", micro, "2", passes, "3", *exact],
        "engine": ["--engine", "auto", "--dataset", "u", micro, "2", passes, "3", *exact],
        "plain_one_pass": ["--engine", "off", "--dataset", "u", micro, "6", passes, "1", *exact],
        "packed": ["--engine", "auto", "--dataset", "p", micro, "3", passes, "1", *exact],
    }
    rest = {name: arguments[10:] for name, arguments in sides.items()}
    assert rest["plain"] == rest["engine"] == rest["plain_one_pass"]
    assert rest["packed"] == [*rest["plain"], "--packing"]

    options.precision = "bf16"
    in_bf16 = script.arguments_of_sides(options, files)
    assert in_bf16.pop("float32") == sides["plain"]
    assert set(in_bf16) == set(sides)
    assert all(arguments[8:10] == ["--precision", "bf16"] for arguments in in_bf16.values())

    options.samples_a_pass = 4
    with pytest.raises(SystemExit, match="6 samples has no whole number of passes of 4"):
        script.arguments_of_sides(options, files)


@pytest.mark.parametrize("key", ["num_tokens", "num_target_tokens"])
def test_sides_with_other_samples_are_refused(script, key):
    sides = {"plain": side([2.0, 1.0]), "packed": side([2.0, 1.0])}
    script.check_same_samples(sides)
    sides["packed"][key] = [LENGTH, 8]
    with pytest.raises(SystemExit, match=f"packed have other samples than those of plain: {key} differ"):
        script.check_same_samples(sides)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("engine", "transformers' and PEFT's own modules, because of this"), ("plain", "dsft's engine: so")],
)
def test_a_side_on_the_wrong_path_is_no_comparison(script, monkeypatch, tmp_path, name, blocks):
    def run(*_arguments, **_options):
        adapter = tmp_path / name / "adapter"
        adapter.mkdir(parents=True)
        summary = f'{{"techniques": {{"blocks": "{blocks}"}}}}'
        (adapter / "training_summary.json").write_text(summary, encoding="utf-8")
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(script.subprocess, "run", run)
    with pytest.raises(SystemExit, match=f"the side {name} ran on {blocks}"):
        script.train(name, [], tmp_path)


def test_figures_of_a_comparison(script):
    sides = {
        "engine": side([2.0, 1.5, 1.0], grad_norms=[1.0, 1.1, 1.0], validation_losses=[2.0, 1.25]),
        "plain": side([2.0, 1.25, 1.125]),
    }
    assert script.compare_sides(sides, "engine", "plain") == {
        "of": "engine",
        "against": "plain",
        "largest": 0.25,
        "mean": 0.125,
        "mean_signed": pytest.approx(0.125 / 3),
        "largest_of_first_10": 0.25,
        "largest_relative_of_grad_norm": pytest.approx(0.1),
        "validation_at_start_and_end": [0.0, 0.25],
    }


def test_the_plot_shows_every_side(script, tmp_path):
    names = ("plain", "plain_one_pass", "engine", "packed")
    sides = {name: side([2.0 + 0.01 * place, 1.5, 1.0]) for place, name in enumerate(names)}
    record = {"sides": sides, "model": "a model", "device": "a device", "settings": {"precision": "fp32"}}
    script.draw(record, tmp_path / "curves.svg")
    content = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(content).tag.endswith("svg")
    for text in ("a model, a device, fp32", "engine, packed", "plain path, one pass a step"):
        assert text in content
    script.draw(record, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text(encoding="utf-8") == content
    sides["float32"] = side([2.1, 1.6, 1.1])
    script.draw(record, tmp_path / "curves.svg")
    assert "engine - plain path in float32" in (tmp_path / "curves.svg").read_text(encoding="utf-8")


def test_in_16_bits_every_side_is_compared_with_float32_too(script):
    names = ("plain", "plain_one_pass", "engine", "packed")
    without = script.choose_comparisons(dict.fromkeys(names))
    assert all("float32" not in pair for pair in without)
    added = set(script.choose_comparisons(dict.fromkeys([*names, "float32"]))) - set(without)
    assert added == {(name, "float32") for name in names}
