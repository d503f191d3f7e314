"""The arithmetic of a merge in pieces: any division into rows gives the reference, and what rounding leaves is told."""

import weakref
from math import prod
from pathlib import Path
from typing import get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

import dsft.merge.arithmetic
import dsft.merge.nf4
from dsft.core.models.attention import PER_SAMPLE, AttentionKernel
from dsft.core.models.device import Device, Precision
from dsft.core.models.load import load_quantized
from dsft.core.models.source import find_model
from dsft.core.models.weight_files import WeightFiles
from dsft.merge.arithmetic import MergedRows, UpdateShare, measure_share
from dsft.merge.config import MergeConfig
from dsft.merge.setup import prepared
from tests.merge_kinds import KINDS, PLAIN, Kind
from tests.merge_models import compute_reference, round_exactly, write_base, write_lora
from tests.unit.merge.refusals import merge, record_run

FLOAT32_STEP = torch.finfo(torch.float32).eps

DIVIDED = """all-linear bias-all lora-bias-and-all dora dora-embedding saved-block tokens conv1d-dora conv1d-lora-bias
    resized-tied-tokens tied-lora-each"""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in DIVIDED.split()], ids=str)
@pytest.mark.parametrize("most_values", [1, 200, 5000])
def test_any_division_into_pieces_gives_the_reference(
    kind: Kind, most_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsft.merge.arithmetic, "_PIECE_VALUES", most_values)
    base = write_base(tmp_path / "base", kind.family, is_tied=kind.is_tied)
    adapted = write_lora(tmp_path / "adapter", base, kind.settings, num_new_tokens=kind.num_new_tokens)
    reference = compute_reference(adapted)
    num_divided = 0
    with prepared(MergeConfig(str(tmp_path / "adapter")), lambda event: None) as setup:
        for tensor in setup.source.tensors:
            pieces = list(setup.source.read_float32(tensor))
            row_values = prod(tensor.shape[1:])
            assert all(piece.dtype == torch.float32 for piece in pieces)
            assert all(len(piece) == 1 or piece.numel() <= most_values + row_values for piece in pieces)
            num_divided += len(pieces) > 1
            expected = reference[tensor.name]
            found = torch.cat(pieces).double()
            assert found.shape == tensor.shape
            assert (found - expected).abs().max() <= 4 * FLOAT32_STEP * expected.abs().max(), tensor.name
    assert num_divided > 5


@pytest.mark.parametrize("name", ["saved-block", "resized-tied-tokens"])
def test_tensors_that_the_adapter_holds_are_read_by_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained embedding or head is as large as the largest tensor of the model."""
    monkeypatch.setattr(dsft.merge.arithmetic, "_PIECE_VALUES", 200)
    kind = next(kind for kind in KINDS if kind.name == name)
    base = write_base(tmp_path / "base", kind.family, is_tied=kind.is_tied)
    write_lora(tmp_path / "adapter", base, kind.settings, num_new_tokens=kind.num_new_tokens)
    whole: list[str] = []
    right = WeightFiles.read

    def read(self: WeightFiles, name: str) -> torch.Tensor:
        whole.append(name)
        return right(self, name)

    monkeypatch.setattr(WeightFiles, "read", read)
    with prepared(MergeConfig(str(tmp_path / "adapter")), lambda event: None) as setup:
        assert not whole
        held = [recipe for recipe in setup.source.plan.recipes if recipe.origin == "adapter"]
        for recipe in held:
            for pieces in (setup.source.divide(recipe), setup.source.divide_source(recipe)):
                num_pieces = len([make() for make in pieces])
                assert num_pieces > 1 or len(recipe.tensor.shape) == 1
    assert held
    assert not {recipe.source for recipe in held} & set(whole)


def test_the_adapter_s_file_is_closed_with_the_merge(adapter: Path) -> None:
    with prepared(MergeConfig(str(adapter)), lambda event: None) as setup:
        setup.source.read_adapter(min(setup.source.adapter.weights.names))
        assert any("adapter_model" in file for file in open_files())
    assert not any("adapter_model" in file or "model.safetensors" in file for file in open_files())


def open_files() -> list[str]:
    links = Path("/proc/self/fd").iterdir()
    return [str(link.readlink()) for link in links if link.is_symlink()]


def test_the_nf4_round_trip_lets_go_of_the_weight_and_returns_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[bool] = []
    weight = torch.randn(64, 64)
    left = weakref.ref(weight)
    monkeypatch.setattr(dsft.merge.nf4, "return_freed_memory", lambda: alive.append(left() is not None))
    holder = [weight]
    del weight
    rounded = dsft.merge.nf4.round_to_nf4(holder.pop(), torch.bfloat16)
    assert (rounded.shape, rounded.dtype) == ((64, 64), torch.bfloat16)
    assert alive == [False]


def test_what_is_left_of_an_update_is_its_projection() -> None:
    before, merged = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1.5, 2.0, -3.25])
    for rounded, share in ((merged, 1.0), (before, 0.0), (torch.tensor([1.5, 2.0, -3.0]), 0.8)):
        assert measure_share(rounded, MergedRows(merged, before)).share == pytest.approx(share)


def test_shares_of_several_tensors_count_by_their_updates() -> None:
    total = UpdateShare()
    assert total.share is None
    total.add(measure_share(torch.ones(3), MergedRows(torch.ones(3), None)))  # no update
    total.add(measure_share(torch.ones(3), MergedRows(torch.ones(3), torch.ones(3))))  # an update of nothing
    assert total.share is None
    total.add(measure_share(torch.tensor([2.0]), MergedRows(torch.tensor([2.0]), torch.tensor([0.0]))))
    total.add(measure_share(torch.tensor([0.0]), MergedRows(torch.tensor([4.0]), torch.tensor([0.0]))))
    assert total.share == pytest.approx(4 / 20)


@pytest.mark.parametrize("size", [0.1, 0.003])
def test_the_share_that_is_told_is_that_of_all_updated_weights(size: float, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapted = write_lora(tmp_path / "adapter", base, PLAIN.settings, size=size)
    kept = exact = 0.0
    stored = load_file(base / "model.safetensors")
    for name, weight in compute_reference(adapted).items():
        before = stored[name].double()
        rounded, _ = round_exactly(weight, torch.bfloat16)
        kept += float(((rounded - before) * (weight - before)).sum())
        exact += float((weight - before).square().sum())
    assert merge(tmp_path / "adapter").update_kept == pytest.approx(kept / exact, rel=1e-3)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_nf4_rounding_is_what_training_computed_with(precision: Precision, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapted = write_lora(tmp_path / "adapter", base, PLAIN.settings)
    stored = load_file(base / "model.safetensors")
    updates = {name: weight - stored[name].double() for name, weight in compute_reference(adapted).items()}
    record_run(tmp_path / "adapter", str(base), precision=precision)
    merge(tmp_path / "adapter", dtype="float32", base_rounding="nf4")
    found = load_file(tmp_path / "adapter" / "merged_model" / "model.safetensors")

    model = load_quantized(find_model(str(base)), Device("cpu", "CPU"), precision, AttentionKernel(PER_SAMPLE, ""))
    quantized = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) == 14
    for name, weight in found.items():
        start = stored[name].double()
        if name in quantized:
            module = quantized[name]
            start = dequantize_4bit(module.weight.data, module.weight.quant_state).double()
            assert (start - stored[name].double()).abs().max() > 0.001
        expected = start + updates[name]
        assert (weight.double() - expected).abs().max() <= 4 * FLOAT32_STEP * expected.abs().max(), name
