"""`dsft monitor --wait-free`: returns when a GPU, or a MIG instance, has so much memory free."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsft.core.errors import DoesNotFitError, DsftError, NoGpuError
from dsft.core.units import GIB, format_gib
from dsft.monitor.config import MonitorConfig
from dsft.monitor.sample import GpuSample, Problem
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
    on_lost: Callable[[Problem], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> MemoryFree:
    """Wait until one of the GPUs that are watched has so much memory free; one that is lost may come back.

    Args:
        config: Which GPUs, how often they are asked, and how long at most.
        needed_bytes: How much.
        gpus: Reads them.
        on_wait: Called with the most that is free, at each look that found too little.
        on_lost: Called once for each loss of a GPU.
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
    looks = _Looks(gpus, needed_bytes, on_lost)
    while True:
        roomiest = looks.find_roomiest()
        waited_s = clock() - started_s
        if roomiest is not None and roomiest.free_bytes >= needed_bytes:
            return MemoryFree(roomiest.gpu_index, roomiest.uuid, roomiest.free_bytes, waited_s)
        left_s = config.interval_s if config.duration_s is None else config.duration_s - waited_s
        if left_s < _ROUNDING_S:
            raise _make_timeout(needed_bytes, roomiest, looks.lost, waited_s)
        on_wait(0 if roomiest is None else roomiest.free_bytes)
        sleep(min(config.interval_s, left_s))


class _Looks:
    """Looks at the GPUs, one after the other.

    Attributes:
        lost: Those that were lost at the last look, and why.
    """

    def __init__(self, gpus: ReadsGpus, needed_bytes: int, on_lost: Callable[[Problem], None]) -> None:
        self.lost: dict[int, Problem] = {}
        self._gpus = gpus
        self._needed_bytes = needed_bytes
        self._on_lost = on_lost
        self._has_seen_one = False

    def find_roomiest(self) -> _Device | None:
        """Return the device with the most free memory, or None where the only ones that could be are lost now."""
        reading = self._gpus.read(0)
        usable = [gpu for gpu in reading.gpus if gpu.problem is None]
        problems = {gpu.index: gpu.problem for gpu in reading.gpus if gpu.problem is not None}
        lost = {index: problem for index, problem in problems.items() if problem.kind == "gpu_lost"}
        self._has_seen_one |= bool(usable)
        if reading.problem is not None or not self._has_seen_one or not (usable or lost):
            problem = reading.problem or next(iter(problems.values()))
            raise NoGpuError(problem.found, problem.fix)
        for index in lost.keys() - self.lost.keys():
            self._on_lost(lost[index])
        self.lost = lost
        devices = [device for gpu in usable for device in _list_devices(gpu)]
        if not lost:
            self._check_hope(devices)
        return max(devices, key=lambda device: device.free_bytes, default=None)

    def _check_hope(self, devices: list[_Device]) -> None:
        """Refuse to wait for what can't come."""
        if not devices:
            raise DsftError(
                "No GPU that is watched tells how much of its memory is free.",
                "`dsft monitor` shows what it tells: its memory may be the host's, or MIG be on without an instance.",
            )
        largest_bytes = max(device.largest_free_bytes for device in devices)
        if largest_bytes < self._needed_bytes:
            # A card of 24 GB has 23.99 GiB: two decimals tell that from 24.
            raise DoesNotFitError(
                f"{self._needed_bytes / GIB:g} GiB can't become free: the largest device has "
                f"{largest_bytes / GIB:.2f} GiB without what the driver reserves.",
                "Wait for less.",
            )


def _make_timeout(needed_bytes: int, roomiest: _Device | None, lost: dict[int, Problem], waited_s: float) -> DsftError:
    if roomiest is None:
        problem = next(iter(lost.values()))
        return NoGpuError(problem.found, problem.fix)
    others = f"; lost: GPU {', '.join(map(str, sorted(lost)))}" if lost else ""
    return DoesNotFitError(
        f"{format_gib(needed_bytes)} did not become free within {waited_s:.0f} s; the most is "
        f"{format_gib(roomiest.free_bytes)} on GPU {roomiest.gpu_index}{others}.",
        "Wait longer (--duration), or see by `dsft monitor` who has the memory.",
    )


def _list_devices(gpu: GpuSample) -> Iterator[_Device]:
    # With MIG on, programs see the parts alone; there may be none yet.
    for part in gpu.migs if gpu.is_mig_enabled else (gpu,):
        if part.memory_free_bytes is not None and part.memory_total_bytes is not None:
            largest_free_bytes = part.memory_total_bytes - (part.memory_reserved_bytes or 0)
            yield _Device(gpu.index, part.uuid, part.memory_free_bytes, largest_free_bytes)
