"""GPU memory between and after the rows of a bench: emptied, peaks set back, peaks read; on a CPU the resident set."""

import ctypes
import gc

import psutil
import torch

from dsft.bench.figures import MemoryFigures
from dsft.core.gpu import GpuMemoryReader


class MemoryMeter:
    """Reads the peaks of one row.

    Args:
        is_gpu: Whether rows run on a GPU.
        reader: Reads the device's memory; None on a CPU or without NVML.
    """

    def __init__(self, *, is_gpu: bool, reader: GpuMemoryReader | None) -> None:
        self._is_gpu = is_gpu
        self._reader = reader
        self._process = psutil.Process()
        self._device_bytes: int | None = None
        self._host_bytes = 0

    def reset(self) -> None:
        """Give back what nothing needs any more, and begin new peaks."""
        self._device_bytes = None
        self._host_bytes = 0
        gc.collect()
        if self._is_gpu and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            free_paged_state()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def sample(self) -> None:
        """Look at the device and the process now; the allocator gives nothing back, so once a step is enough."""
        self._host_bytes = max(self._host_bytes, self._process.memory_info().rss)
        if self._reader is not None:
            self._device_bytes = max(self._device_bytes or 0, self._reader.read().used_bytes)

    def peak(self) -> MemoryFigures | None:
        """Return the peaks of GPU memory since the last reset; None on a CPU."""
        if not self._is_gpu:
            return None
        return MemoryFigures(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), self._device_bytes)

    @property
    def host_bytes(self) -> int:
        """The largest resident set that was seen."""
        return self._host_bytes


def free_paged_state() -> None:
    """Free the pageable optimizer state of optimizers that are gone.

    bitsandbytes never does: its page manager keeps every such tensor, and the memory under them has no owner that would
    free it, so the rows of a bench would pile theirs up on the device.
    """
    from bitsandbytes.functional import GlobalPageManager

    tensors = GlobalPageManager.get_instance().paged_tensors
    if not tensors:
        return
    torch.cuda.synchronize()
    driver = ctypes.CDLL("libcuda.so.1")
    while tensors:
        tensor = tensors.pop()
        code = driver.cuMemFree_v2(ctypes.c_uint64(tensor.data_ptr()))
        if code != 0:
            raise RuntimeError(f"the CUDA driver can't free paged optimizer state (cuMemFree returned {code})")
