"""`dsft monitor`: samples at fixed times, and what the last of them means for the command's end."""

import math
import time
from collections.abc import Callable

from dsft.core.errors import DsftError, NoGpuError
from dsft.monitor.config import MonitorConfig
from dsft.monitor.host import HostReader
from dsft.monitor.nvml.gpus import NvmlGpus
from dsft.monitor.runs import LiveRuns
from dsft.monitor.sample import AlertSample, Problem, Sample
from dsft.monitor.sampler import ReadsSamples, Sampler

_CPU_WINDOW_S = 0.25
"""How long a single sample watches the CPU; the use of it is a difference between two looks."""

_ROUNDING_S = 1e-6
"""3 times 0.7 s is a little less than 2.1 s; no further sample fits in between."""


class Schedule:
    """Points of a grid of times, at which samples are taken; those that are missed are left out.

    Args:
        config: Interval and duration.
        clock: Monotonic clock in seconds; the first point is now.

    Attributes:
        due_s: The point that is next, or the end, on that clock.
    """

    def __init__(self, config: MonitorConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._num_intervals = 0
        self._started_s = self.due_s = clock()

    def advance(self) -> bool:
        """Go to the next point; returns whether a sample is taken there, because the time is not over before it."""
        num_passed = math.floor((self._clock() - self._started_s) / self._config.interval_s)
        # Rounding can put the time just before the point it is: never the same one twice.
        self._num_intervals = max(self._num_intervals, num_passed) + 1
        next_s, duration_s = self._num_intervals * self._config.interval_s, self._config.duration_s
        is_over = duration_s is not None and next_s >= duration_s - _ROUNDING_S
        self.due_s = self._started_s + (duration_s if is_over and duration_s is not None else next_s)
        return not is_over


def open_sampler(config: MonitorConfig) -> Sampler:
    """Return what reads all that is asked for."""
    host = HostReader() if config.reads_host else None
    if host is not None and config.is_once:
        host.read()
        time.sleep(_CPU_WINDOW_S)
    return Sampler(config, NvmlGpus(config.gpus), host, LiveRuns())


def watch(
    config: MonitorConfig,
    sampler: ReadsSamples,
    sink: Callable[[Sample], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Sample:
    """Give a sample to the sink at each point of a grid of times, and return the last one when the time is over.

    Points that were missed, because the machine slept say, are left out.

    Args:
        config: Interval and duration.
        sampler: Reads the samples.
        sink: Takes them.
        sleep: Waits.
        clock: Monotonic clock in seconds.

    Raises:
        ConfigError: A GPU that was asked for is not there.
    """
    schedule = Schedule(config, clock)
    while True:
        sample = sampler.read()
        sink(sample)
        if config.is_once:
            return sample
        goes_on = schedule.advance()
        sleep(max(0.0, schedule.due_s - clock()))
        if not goes_on:
            return sample


def find_problems(sample: Sample) -> tuple[Problem, ...]:
    """Return why GPUs that are watched can't be read."""
    of_gpus = tuple(gpu.problem for gpu in sample.gpus if gpu.problem is not None)
    return of_gpus if sample.problem is None else (sample.problem, *of_gpus)


def check_gpus(sample: Sample) -> None:
    """Refuse a sample without a usable GPU, or with one that can't be read among those that are watched.

    Raises:
        NoGpuError: It is so.
    """
    problems = find_problems(sample)
    if problems:
        raise NoGpuError(" ".join(problem.found for problem in problems), problems[0].fix)


def check_alerts_are_known(sample: Sample) -> None:
    """Refuse a sample in which a limit could not be judged, so that nobody takes that for all being well.

    Raises:
        DsftError: It is so.
    """
    unknown = [alert for alert in sample.alerts if alert.is_fired is None]
    if unknown:
        raise DsftError(
            " ".join(f"The alert {alert.alert} can't be judged: {_describe_unknown(alert)}." for alert in unknown),
            "Leave it out, or set a limit on something that is told: `dsft monitor --once` shows what is.",
        )


def _describe_unknown(alert: AlertSample) -> str:
    if alert.gpu_index is None:
        return "the host's value is not told"
    part = f" MIG {alert.mig_index}" if alert.mig_index is not None else ""
    return f"GPU {alert.gpu_index}{part} does not tell it"
