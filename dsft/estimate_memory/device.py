"""GPU 0 of this machine as the driver describes it; nothing here opens a CUDA context."""

import os
from dataclasses import dataclass
from typing import Any

_RTX_4090_MULTIPROCESSORS = 128


@dataclass(frozen=True)
class LocalGpu:
    """A GPU that is there.

    Attributes:
        name: As the driver names it.
        total_bytes: Its memory.
        used_bytes: What of it the driver and other processes have.
        capability: CUDA compute capability.
        multiprocessors: Their number.
    """

    name: str
    total_bytes: int
    used_bytes: int
    capability: tuple[int, int]
    multiprocessors: int


def read_gpu_zero() -> LocalGpu | None:
    """Return the GPU that a run would take, or None where the driver shows none.

    That is the first of CUDA_VISIBLE_DEVICES, where it is set. CUDA may number unlike cards by their speed and NVML
    does so by their place: only a UUID names one for certain.
    """
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.partition(",")[0].strip()
    try:
        pynvml.nvmlInit()
        try:
            return _read(pynvml, first)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _read(nvml: Any, first: str) -> LocalGpu | None:
    if first.isdigit():
        handle = nvml.nvmlDeviceGetHandleByIndex(int(first))
    elif first.startswith(("GPU-", "MIG-")):
        handle = nvml.nvmlDeviceGetHandleByUUID(first)
    else:  # empty, -1: the user hides all GPUs
        return None
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    name = nvml.nvmlDeviceGetName(handle)
    return LocalGpu(
        name=name.decode() if isinstance(name, bytes) else str(name),
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        capability=(int(major), int(minor)),
        multiprocessors=_count_multiprocessors(nvml, handle, (int(major), int(minor))),
    )


def _count_multiprocessors(nvml: Any, handle: Any, capability: tuple[int, int]) -> int:
    cores = 64 if capability in ((7, 0), (7, 5), (8, 0)) else 128  # of a multiprocessor
    try:
        return max(1, int(nvml.nvmlDeviceGetNumGpuCores(handle)) // cores)
    except nvml.NVMLError:  # drivers before 510 can't tell; it matters only for cards that have no record
        return _RTX_4090_MULTIPROCESSORS
