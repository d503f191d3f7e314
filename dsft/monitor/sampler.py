"""Puts one sample together from those who read GPUs, host and runs."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from dsft.monitor.alerts import judge
from dsft.monitor.config import MonitorConfig
from dsft.monitor.nvml.gpus import GpuReading
from dsft.monitor.sample import HostSample, RunSample, Sample


class ReadsSamples(Protocol):
    """Reads everything that is watched; `Sampler` does."""

    def read(self) -> Sample:
        """Return a sample of now."""


class ReadsGpus(Protocol):
    """Reads the GPUs that are watched; `nvml/gpus.py` has it."""

    def read(self, num_pcie_measurements: int) -> GpuReading:
        """Return what the driver says now; what it does not say is no exception."""


class ReadsHost(Protocol):
    """Reads the host; `host.py` has it."""

    def read(self) -> HostSample:
        """Return what the system says now."""


class ReadsRuns(Protocol):
    """Follows the training runs; `runs.py` has it."""

    def read(self) -> tuple[RunSample, ...]:
        """Return the runs that are going on now."""


_PCIE_MEASUREMENT_S = 0.021
_PCIE_SHARE = 0.1
"""The driver measures PCIe traffic for 20 ms a direction, in which the caller waits: so much of the interval at most,
GPUs and directions by turns."""


class Sampler:
    """Reads all that is watched.

    Args:
        config: What that is.
        gpus: Reads GPUs.
        host: Reads the host; None where it is not asked for.
        runs: Follows training runs.
    """

    def __init__(self, config: MonitorConfig, gpus: ReadsGpus, host: ReadsHost | None, runs: ReadsRuns) -> None:
        self._config = config
        self._gpus = gpus
        self._host = host
        self._runs = runs
        # The first of many samples does not wait for measurements; a single one waits for all.
        self._num_pcie_measurements = 1_000 if config.is_once else 0

    def read(self) -> Sample:
        """Return a sample of now.

        Raises:
            ConfigError: A GPU that was asked for is not there.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        reading = self._gpus.read(self._num_pcie_measurements)
        by_interval = round(_PCIE_SHARE * self._config.interval_s / _PCIE_MEASUREMENT_S)
        self._num_pcie_measurements = max(1, by_interval)
        sample = Sample(
            time=now,
            problem=reading.problem,
            driver=reading.driver,
            gpus=reading.gpus,
            host=self._host.read() if self._host is not None else None,
            runs=self._runs.read(),
        )
        return replace(sample, alerts=judge(self._config.alerts, sample))
