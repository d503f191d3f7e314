"""Readers of GPUs, host and runs that say what a test wants, and a clock that only sleeping moves."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from dsft.core.units import GIB
from dsft.monitor.nvml.gpus import GpuReading
from dsft.monitor.sample import DriverSample, GpuSample, HostSample, MigSample, Problem, RunSample, Sample

LOST = Problem("gpu_lost", "GPU 1 is lost.", "Reset it.")
NO_DRIVER = Problem("no_driver", "There is no driver.", "Install it.")

GPU = GpuSample(
    index=0,
    uuid="GPU-0000",
    name="NVIDIA Test",
    memory_used_bytes=10 * GIB,
    memory_reserved_bytes=GIB,
    memory_free_bytes=13 * GIB,
    memory_total_bytes=24 * GIB,
    gpu_utilization_percent=90.0,
    memory_bandwidth_utilization_percent=40.0,
    temperature_c=61.0,
    power_w=280.4,
    power_limit_w=350.0,
    sm_clock_mhz=1995.0,
    ecc_uncorrected_errors=0,
    throttle_reasons=(),
    is_mig_enabled=False,
    processes=(),
)
"""A GPU that tells most things, but neither fan nor memory temperature."""

HOST = HostSample(
    num_cpus=8,
    cpu_percent=25.0,
    memory_used_bytes=4 * GIB,
    memory_available_bytes=12 * GIB,
    memory_total_bytes=16 * GIB,
    swap_used_bytes=0,
    swap_total_bytes=0,
    disk_path="/",
    disk_used_bytes=30 * GIB,
    disk_free_bytes=10 * GIB,
    disk_total_bytes=40 * GIB,
)


def make_gpu(index: int = 0, **values: Any) -> GpuSample:
    """Return a GPU with some values other than `GPU` has."""
    return replace(GPU, **({"index": index, "uuid": f"GPU-000{index}"} | values))


def make_lost_gpu(index: int = 1) -> GpuSample:
    """Return a GPU that can't be read."""
    return GpuSample(index, f"GPU-000{index}", "NVIDIA Test", LOST)


def make_mig(index: int, free_gib: float | None, total_gib: float | None) -> MigSample:
    """Return an instance with so much memory."""
    free, total = (None if gib is None else round(gib * GIB) for gib in (free_gib, total_gib))
    return MigSample(index, f"MIG-{index}", "1g.10gb", memory_free_bytes=free, memory_total_bytes=total, processes=())


def make_sample(*gpus: GpuSample, **values: Any) -> Sample:
    """Return a sample of these GPUs."""
    return Sample(time="2026-01-02T03:04:05.678+00:00", driver=DriverSample("580.0", "13.0"), gpus=gpus, **values)


class ScriptedGpus:
    """Gives one reading after the other, the last one for ever.

    Attributes:
        num_pcie_measurements: What each read was allowed.
    """

    def __init__(self, *readings: Iterable[GpuSample] | Problem) -> None:
        self._readings = list(readings)
        self.num_pcie_measurements: list[int] = []

    def read(self, num_pcie_measurements: int) -> GpuReading:
        self.num_pcie_measurements.append(num_pcie_measurements)
        reading = self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]
        if isinstance(reading, Problem):
            return GpuReading(reading, None, ())
        return GpuReading(None, DriverSample("580.0", "13.0"), tuple(reading))


class ScriptedHost:
    """Always says the same."""

    def __init__(self, host: HostSample = HOST) -> None:
        self._host = host

    def read(self) -> HostSample:
        return self._host


class ScriptedRuns:
    """Always says the same."""

    def __init__(self, *runs: RunSample) -> None:
        self._runs = runs

    def read(self) -> tuple[RunSample, ...]:
        return self._runs


class ScriptedSampler:
    """Gives one sample after the other, and does something before each."""

    def __init__(self, samples: Iterable[Sample], before: Callable[[], None] = lambda: None) -> None:
        self._samples: Iterator[Sample] = iter(samples)
        self._before = before

    def read(self) -> Sample:
        self._before()
        return next(self._samples)


class FakeClock:
    """A clock that stands still but for `sleep`.

    Attributes:
        now_s: What it shows.
        slept_s: Each sleep.
    """

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        assert duration_s >= 0
        self.slept_s.append(duration_s)
        self.now_s += duration_s
