"""A model that reads its weights as it runs: the same logits, and never more than one module's weights in memory."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dsft.merge.config import MergeConfig
from dsft.merge.setup import prepared
from dsft.merge.streamed_model import ReadRows, Streaming, find_units
from tests.merge_kinds import KINDS, Kind
from tests.merge_models import make_ids, run_logits, write_base, write_lora

STREAMED = ["all-linear", "dora", "saved-block", "saved-attention", "tokens", "embedding-and-head", "conv1d-dora"]


class Weights:
    """Gives weights in pieces, and watches which of them are in memory whenever one is asked for."""

    def __init__(self, adapted: PeftModel, empty: nn.Module, most_rows: int) -> None:
        self._weights = adapted.base_model.model.state_dict()
        self._empty = empty
        self._most_rows = most_rows
        self._units = sorted((path for path, _ in find_units(empty)), key=len, reverse=True)
        self._given: list[tuple[str, weakref.ReferenceType[object]]] = []
        self.num_read = 0

    def divide(self, name: str) -> tuple[tuple[int, ...], Iterator[ReadRows]]:
        unit = self._find_unit(name)
        others = {self._find_unit(other) for other in self.find_loaded()} | self.find_alive()
        assert others <= {unit}, f"{name} is read while others are in memory"
        self.num_read += 1
        weight = self._weights[name]
        return tuple(weight.shape), (partial(self._read, unit, rows) for rows in weight.split(self._most_rows))

    def find_loaded(self) -> list[str]:
        return [name for name, parameter in self._empty.named_parameters() if not parameter.is_meta]

    def find_alive(self) -> set[str]:
        return {unit for unit, array in self._given if array() is not None}

    def _read(self, unit: str, rows: Tensor) -> Tensor:
        array = rows.numpy().copy()
        self._given.append((unit, weakref.ref(array)))  # the array lives as long as any tensor on its memory
        return torch.from_numpy(array)

    def _find_unit(self, name: str) -> str:
        return next(unit for unit in self._units if name.startswith(f"{unit}."))


@pytest.fixture(params=[kind for kind in KINDS if kind.name in STREAMED], ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def adapted(kind: Kind, tmp_path: Path) -> PeftModel:
    base = write_base(tmp_path / "base", kind.family, is_tied=kind.is_tied)
    return write_lora(tmp_path / "adapter", base, kind.settings)


@pytest.fixture
def empty(adapted: PeftModel, tmp_path: Path) -> nn.Module:
    """The same model on the meta device."""
    with prepared(MergeConfig(str(tmp_path / "adapter")), lambda event: None) as setup:
        return setup.structure.adapted.base_model.model


@pytest.fixture(params=[1000, 7], ids=["whole", "pieces"])
def weights(request: pytest.FixtureRequest, adapted: PeftModel, empty: nn.Module) -> Weights:
    return Weights(adapted, empty, request.param)


def test_streamed_weights_give_the_same_logits_one_module_at_a_time(
    adapted: PeftModel, empty: nn.Module, weights: Weights
) -> None:
    Streaming(weights.divide, torch.device("cpu")).attach(empty)
    ids = make_ids(adapted)
    found = run_logits(empty, ids)
    torch.testing.assert_close(found, run_logits(adapted, ids), rtol=1e-5, atol=1e-5)
    assert weights.find_alive() == set() and weights.find_loaded() == []

    num_read = weights.num_read
    assert torch.equal(run_logits(empty, ids), found)
    assert weights.num_read == 2 * num_read > 0


@dataclass(frozen=True)
class MergedHalf:
    """Second weights: each module merged by PEFT, then all of them halved."""

    num_samples: int

    def round(self, weight: Tensor) -> Tensor:
        return weight / 2

    def change(self, unit: nn.Module) -> None:
        if isinstance(unit, LoraLayer):
            unit.merge()
        for parameter in unit.parameters():
            if not parameter.is_meta:
                parameter.data.mul_(0.5)

    def restore(self, unit: nn.Module) -> None:
        if isinstance(unit, LoraLayer):
            unit.merged_adapters.clear()


def test_both_halves_of_a_batch_share_one_reading(adapted: PeftModel, empty: nn.Module, weights: Weights) -> None:
    ids = make_ids(adapted)
    Streaming(weights.divide, torch.device("cpu"), MergedHalf(len(ids))).attach(empty)
    as_it_is, changed = run_logits(empty, ids.repeat(2, 1)).chunk(2)
    torch.testing.assert_close(as_it_is, run_logits(adapted, ids), rtol=1e-5, atol=1e-5)
    assert weights.find_alive() == set() and weights.find_loaded() == []

    adapted.merge_adapter()
    for parameter in adapted.parameters():  # a tied one once
        parameter.data.mul_(0.5)
    torch.testing.assert_close(changed, run_logits(adapted, ids), rtol=1e-4, atol=1e-4)


def test_weights_are_let_go_when_a_module_fails(
    adapted: PeftModel, empty: nn.Module, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    Streaming(weights.divide, torch.device("cpu")).attach(empty)

    def fail(*args: object, **kwargs: object) -> None:
        raise FloatingPointError

    monkeypatch.setattr(nn.functional, "linear", fail)
    monkeypatch.setattr(torch, "addmm", fail)
    with pytest.raises(FloatingPointError):
        run_logits(empty, make_ids(adapted))
    assert weights.find_loaded() == []
