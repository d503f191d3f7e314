"""`dsft monitor --wait-free`: returns when a GPU, or a MIG instance, has so much memory free."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsft.core.errors import DoesNotFitError, DsftError, NoGpuError
from dsft.core.units import GIB, format_gib
from dsft.monitor.config import MonitorConfig
from dsft.monitor.sample import GpuSample
from dsft.monitor.sampler import ReadsGpus

_ROUNDING_S = 1e-6
"""What sums of floating-point times may leave of a time that is over."""


@dataclass(frozen=True)
class MemoryFree:
    """A device with enough free memory.

    Attributes:
        gpu_index: As NVML counts.
        uuid: Of the GPU or the MIG instance, as CUDA_VISIBLE_DEVICES takes it.
        memory_free_bytes: What is free.
        waited_s: How long it took.
    """

    gpu_index: int
    uuid: str | None
    memory_free_bytes: int
    waited_s: float


@dataclass(frozen=True)
class _Device:
    gpu_index: int
    uuid: str | None
    free_bytes: int
    largest_free_bytes: int


def wait_free(
    config: MonitorConfig,
    needed_bytes: int,
    gpus: ReadsGpus,
    on_wait: Callable[[int], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> MemoryFree:
    """Wait until one of the GPUs that are watched has so much memory free.

    Args:
        config: Which GPUs, how often they are asked, and how long at most.
        needed_bytes: How much.
        gpus: Reads them.
        on_wait: Called with the most that is free, at each look that found too little.
        sleep: Waits.
        clock: Monotonic clock in seconds.

    Returns:
        The device with the most free memory.

    Raises:
        DoesNotFitError: No device is that large, or the time is over.
        NoGpuError: There is no usable GPU.
        DsftError: No GPU tells its memory.
        ConfigError: A GPU that was asked for is not there.
    """
    started_s = clock()
    while True:
        roomiest = _find_roomiest(gpus, needed_bytes)
        waited_s = clock() - started_s
        if roomiest.free_bytes >= needed_bytes:
            return MemoryFree(roomiest.gpu_index, roomiest.uuid, roomiest.free_bytes, waited_s)
        left_s = config.interval_s if config.duration_s is None else config.duration_s - waited_s
        if left_s < _ROUNDING_S:
            raise DoesNotFitError(
                f"{format_gib(needed_bytes)} did not become free within {waited_s:.0f} s; the most is "
                f"{format_gib(roomiest.free_bytes)} on GPU {roomiest.gpu_index}.",
                "Wait longer (--duration), or see by `dsft monitor` who has the memory.",
            )
        on_wait(roomiest.free_bytes)
        sleep(min(config.interval_s, left_s))


def _find_roomiest(gpus: ReadsGpus, needed_bytes: int) -> _Device:
    reading = gpus.read(0)
    problems = [gpu.problem for gpu in reading.gpus if gpu.problem is not None]
    usable = [gpu for gpu in reading.gpus if gpu.problem is None]
    if not usable:
        problem = reading.problem or problems[0]
        raise NoGpuError(problem.found, problem.fix)
    devices = [device for gpu in usable for device in _list_devices(gpu)]
    if not devices:
        raise DsftError(
            "No GPU that is watched tells how much of its memory is free.",
            "`dsft monitor` shows what it tells: the host's memory may be its own, or MIG be on without an instance.",
        )
    largest_bytes = max(device.largest_free_bytes for device in devices)
    if largest_bytes < needed_bytes:
        # A card of 24 GB has 23.99 GiB: two decimals tell that from 24.
        raise DoesNotFitError(
            f"{needed_bytes / GIB:g} GiB can't become free: the largest device has {largest_bytes / GIB:.2f} GiB "
            "without what the driver reserves.",
            "Wait for less.",
        )
    return max(devices, key=lambda device: device.free_bytes)


def _list_devices(gpu: GpuSample) -> Iterator[_Device]:
    # With MIG on, programs see the parts alone; there may be none yet.
    for part in gpu.migs if gpu.is_mig_enabled else (gpu,):
        if part.memory_free_bytes is not None and part.memory_total_bytes is not None:
            largest_free_bytes = part.memory_total_bytes - (part.memory_reserved_bytes or 0)
            yield _Device(gpu.index, part.uuid, part.memory_free_bytes, largest_free_bytes)
