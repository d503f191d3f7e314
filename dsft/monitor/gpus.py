"""Reads GPUs through NVML; what the driver does not tell is None, what is broken is a sentence."""

from dataclasses import dataclass

from dsft.monitor.sample import DriverSample, GpuSample, Problem


@dataclass(frozen=True)
class GpuReading:
    """What NVML said.

    Attributes:
        problem: Why no GPU at all can be read.
        driver: The driver; None where NVML does not answer.
        gpus: The GPUs that are watched, by index.
    """

    problem: Problem | None
    driver: DriverSample | None
    gpus: tuple[GpuSample, ...]
