"""Paged optimizer state of earlier rows is freed, all of it, and once."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import GlobalPageManager

from dsft.bench.memory import MemoryMeter, free_paged_state


class FakeDriver:
    def __init__(self, code: int = 0) -> None:
        self.freed: list[int] = []
        self._code = code

    def cuMemFree_v2(self, pointer: ctypes.c_uint64) -> int:
        self.freed.append(pointer.value)
        return self._code


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    tensors = [torch.zeros(3), torch.zeros(4)]
    monkeypatch.setattr(GlobalPageManager, "get_instance", lambda: SimpleNamespace(paged_tensors=tensors))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return tensors


def test_every_paged_tensor_is_freed_once(paged: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    pointers, driver = {tensor.data_ptr() for tensor in paged}, FakeDriver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    free_paged_state()
    free_paged_state()
    assert sorted(driver.freed) == sorted(pointers)
    assert paged == []


def test_a_driver_that_refuses_is_told(paged: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(code=1))
    with pytest.raises(RuntimeError, match="cuMemFree returned 1"):
        free_paged_state()


def test_the_device_peak_is_the_largest_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([5, 9, 7])
    reader = SimpleNamespace(read=lambda: SimpleNamespace(used_bytes=next(readings)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2)
    meter = MemoryMeter(is_gpu=True, reader=reader)
    for _ in range(3):
        meter.sample()
    peak = meter.peak()
    assert peak is not None
    assert (peak.allocated_bytes, peak.reserved_bytes, peak.device_bytes) == (1, 2, 9)
    assert meter.host_bytes > 0


def test_a_cpu_has_no_gpu_memory() -> None:
    assert MemoryMeter(is_gpu=False, reader=None).peak() is None
