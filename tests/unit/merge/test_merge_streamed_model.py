"""A model that reads its weights as it runs: the same logits, and never more than one module's weights in memory."""

import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dsft.merge.config import MergeConfig
from dsft.merge.setup import prepared
from dsft.merge.streamed_model import find_units, stream_weights, stream_weights_twice
from tests.merge_kinds import KINDS, Kind
from tests.merge_models import make_ids, run_logits, write_base, write_lora

STREAMED = ["all-linear", "dora", "saved-block", "saved-attention", "tokens", "embedding-and-head", "conv1d-dora"]


class Weights:
    """Gives copies of weights, and watches which of them are in memory whenever one is asked for."""

    def __init__(self, model: nn.Module, units: list[str]) -> None:
        self._weights = model.state_dict()
        self._units = sorted(units, key=len, reverse=True)
        self._given: list[tuple[str, int, weakref.ReferenceType[object]]] = []
        self.num_read = 0
        self.most_bytes = 0

    def read(self, name: str) -> Tensor:
        unit = self._find_unit(name)
        assert {alive for alive, _ in self._alive()} <= {unit}, f"{name} is read while others are in memory"
        # The array lives as long as any tensor on its memory.
        array = self._weights[name].numpy().copy()
        self._given.append((unit, array.nbytes, weakref.ref(array)))
        self.num_read += 1
        self.most_bytes = max(self.most_bytes, sum(size for _, size in self._alive()))
        return torch.from_numpy(array)

    def num_alive(self) -> int:
        return len(self._alive())

    def find_largest_unit_bytes(self) -> int:
        sizes = dict.fromkeys(self._units, 0)
        for name, weight in self._weights.items():
            if ".original_module." not in name:
                sizes[self._find_unit(name)] += weight.nbytes
        return max(sizes.values())

    def _alive(self) -> list[tuple[str, int]]:
        return [(unit, size) for unit, size, array in self._given if array() is not None]

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


def test_streamed_weights_give_the_same_logits_one_module_at_a_time(adapted: PeftModel, empty: nn.Module) -> None:
    weights = Weights(adapted.base_model.model, [path for path, _ in find_units(empty)])
    stream_weights(empty, weights.read, torch.device("cpu"))
    ids = make_ids(adapted)
    torch.testing.assert_close(run_logits(empty, ids), run_logits(adapted, ids), rtol=1e-5, atol=1e-5)
    assert weights.num_alive() == 0
    assert 0 < weights.most_bytes <= weights.find_largest_unit_bytes()
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_second_run_reads_again(adapted: PeftModel, empty: nn.Module) -> None:
    weights = Weights(adapted.base_model.model, [path for path, _ in find_units(empty)])
    stream_weights(empty, weights.read, torch.device("cpu"))
    ids = make_ids(adapted)
    first, num_read = run_logits(empty, ids), weights.num_read
    assert torch.equal(run_logits(empty, ids), first)
    assert weights.num_read == 2 * num_read


def test_both_halves_of_a_batch_share_one_reading(adapted: PeftModel, empty: nn.Module) -> None:
    """The second half runs with changed weights: here each module merged by PEFT, then all its weights halved."""
    weights = Weights(adapted.base_model.model, [path for path, _ in find_units(empty)])

    def change(unit: nn.Module) -> None:
        if isinstance(unit, LoraLayer):
            unit.merge()
        for parameter in unit.parameters():
            if not parameter.is_meta:
                parameter.data.mul_(0.5)

    def restore(unit: nn.Module) -> None:
        if isinstance(unit, LoraLayer):
            unit.merged_adapters.clear()

    ids = make_ids(adapted)
    stream_weights_twice(empty, weights.read, torch.device("cpu"), len(ids), change, restore)
    as_it_is, changed = run_logits(empty, ids.repeat(2, 1)).chunk(2)
    torch.testing.assert_close(as_it_is, run_logits(adapted, ids), rtol=1e-5, atol=1e-5)
    assert weights.num_alive() == 0
    assert weights.most_bytes <= weights.find_largest_unit_bytes()

    num_read = weights.num_read
    assert torch.equal(run_logits(empty, ids.repeat(2, 1))[: len(ids)], as_it_is)
    assert weights.num_read == 2 * num_read

    adapted.merge_adapter()
    for parameter in adapted.parameters():  # a tied one once
        parameter.data.mul_(0.5)
    torch.testing.assert_close(changed, run_logits(adapted, ids), rtol=1e-4, atol=1e-4)


def test_weights_are_let_go_when_a_module_fails(adapted: PeftModel, empty: nn.Module) -> None:
    weights = Weights(adapted.base_model.model, [path for path, _ in find_units(empty)])
    stream_weights(empty, weights.read, torch.device("cpu"))
    with pytest.raises(IndexError):
        run_logits(empty, torch.full((1, 4), 10**6))
    assert weights.num_alive() == 0
    assert all(parameter.is_meta for parameter in empty.parameters())
