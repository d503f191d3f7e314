"""What `dsft monitor` is asked to watch, and for how long; pure data."""

from dataclasses import dataclass

from dsft.core.errors import ConfigError
from dsft.monitor.alerts import Alert

MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 24 * 3600.0
"""The system's ways of waiting take no time without bounds."""


@dataclass(frozen=True)
class MonitorConfig:
    """What to watch.

    Attributes:
        gpus: Indexes (as NVML counts them) or UUIDs of the GPUs that are watched; empty for all.
        reads_host: Whether CPU, memory, disk and swap of the host are read.
        interval_s: Time from one sample to the next.
        duration_s: When the watch ends by itself; None for never.
        is_once: Whether one sample is all.
        alerts: Limits that are told when they are passed.

    Raises:
        ConfigError: A time is out of range, or two settings contradict each other.
    """

    gpus: tuple[str, ...] = ()
    reads_host: bool = True
    interval_s: float = 1.0
    duration_s: float | None = None
    is_once: bool = False
    alerts: tuple[Alert, ...] = ()

    def __post_init__(self) -> None:
        if not all(self.gpus):
            raise ConfigError("--gpu has an empty place.", "Give indexes or UUIDs with commas between, e.g. --gpu 0,1.")
        if not MIN_INTERVAL_S <= self.interval_s <= MAX_INTERVAL_S:  # NaN is neither
            raise ConfigError(
                f"--interval is {self.interval_s:g}.",
                f"Give seconds, from {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g}, e.g. --interval 2.",
            )
        if self.duration_s is not None and not 0 < self.duration_s < float("inf"):
            raise ConfigError(f"--duration is {self.duration_s:g}.", "Give seconds, e.g. --duration 60.")
        if self.is_once and self.duration_s is not None:
            raise ConfigError("--once and --duration contradict each other.", "Give one of them.")
        of_host = next((alert for alert in self.alerts if alert.is_of_host), None)
        if of_host is not None and not self.reads_host:
            raise ConfigError(
                f"--alert '{of_host}' is about the host, and --no-cpu leaves the host out.", "Give one of them."
            )
