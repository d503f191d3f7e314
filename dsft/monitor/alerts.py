"""Limits that a user sets, such as `vram>95`, and whether a sample passes them."""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dsft.core.errors import ConfigError
from dsft.core.units import GIB
from dsft.monitor.sample import AlertSample, GpuSample, HostSample, Sample
from dsft.monitor.shares import disk_percent, ram_percent, swap_percent, vram_percent


@dataclass(frozen=True)
class _Metric:
    """Something a limit can be set for.

    Attributes:
        unit: Of the limit.
        of_gpu: Reads it from a GPU; None for the host's.
        of_host: Reads it from the host; None for a GPU's.
    """

    unit: str
    of_gpu: Callable[[GpuSample], float | None] | None = None
    of_host: Callable[[HostSample], float | None] | None = None


def _gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / GIB


def _swap_percent(host: HostSample) -> float | None:
    return 0.0 if host.swap_total_bytes == 0 else swap_percent(host)  # a limit on swap holds where there is none


METRICS = {
    "vram": _Metric("%", vram_percent),
    "free": _Metric("GiB", lambda gpu: _gib(gpu.memory_free_bytes)),
    "util": _Metric("%", lambda gpu: gpu.gpu_utilization_percent),
    "bandwidth": _Metric("%", lambda gpu: gpu.memory_bandwidth_utilization_percent),
    "temp": _Metric("°C", lambda gpu: gpu.temperature_c),
    "memtemp": _Metric("°C", lambda gpu: gpu.memory_temperature_c),
    "power": _Metric("W", lambda gpu: gpu.power_w),
    "fan": _Metric("%", lambda gpu: gpu.fan_percent),
    "ecc": _Metric("errors", lambda gpu: gpu.ecc_uncorrected_errors),
    "cpu": _Metric("%", of_host=lambda host: host.cpu_percent),
    "ram": _Metric("%", of_host=ram_percent),
    "swap": _Metric("%", of_host=_swap_percent),
    "disk": _Metric("%", of_host=disk_percent),
}
"""By the name it has in a limit."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

_FORM = re.compile(r"\s*(?P<metric>[a-z]+)\s*(?P<comparison>>=|<=|>|<)\s*(?P<limit>\d+(?:\.\d+)?|\.\d+)\s*")


@dataclass(frozen=True)
class Alert:
    """A limit.

    Attributes:
        metric: A name in `METRICS`.
        comparison: How the value has to compare with the limit for the alert to fire: >, >=, < or <=.
        limit: In the metric's unit.
    """

    metric: str
    comparison: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.limit:.15g}"

    @property
    def is_of_host(self) -> bool:
        """Whether it limits a value of the host, not of each GPU."""
        return METRICS[self.metric].of_host is not None

    def is_passed_by(self, value: float) -> bool:
        """Return whether a value makes the alert fire."""
        return _COMPARISONS[self.comparison](value, self.limit)


def parse_alert(text: str) -> Alert:
    """Read a limit as it is typed, e.g. `vram>95`.

    Raises:
        ConfigError: It has no known metric, or not this form.
    """
    names = ", ".join(METRICS)
    name = text.strip().lower()
    if name in METRICS:
        # A shell takes an unquoted > for itself.
        raise ConfigError(
            f"--alert {name} has no limit.",
            f"Write it in quotes, or the shell takes the > for a file: --alert '{name}>95'.",
        )
    form = _FORM.fullmatch(text.lower())
    if form is None:
        raise ConfigError(
            f"--alert {text!r} is no limit.",
            f"Give one of {names}, then >, >=, < or <=, then a number, all in quotes: --alert 'vram>95'.",
        )
    if form["metric"] not in METRICS:
        raise ConfigError(f"--alert {text!r} names {form['metric']!r}, which is not known.", f"Known are {names}.")
    return Alert(form["metric"], form["comparison"], float(form["limit"]))


def judge(alerts: Iterable[Alert], sample: Sample) -> tuple[AlertSample, ...]:
    """Return each limit on each GPU, or once for the host's values, in the order of the limits."""
    judged = []
    for alert in alerts:
        metric = METRICS[alert.metric]
        if metric.of_gpu is not None:
            judged += [_judge_value(alert, gpu.index, metric.of_gpu(gpu)) for gpu in sample.gpus]
        elif metric.of_host is not None:
            value = metric.of_host(sample.host) if sample.host is not None else None
            judged.append(_judge_value(alert, None, value))
    return tuple(judged)


def _judge_value(alert: Alert, gpu_index: int | None, value: float | None) -> AlertSample:
    is_fired = None if value is None else alert.is_passed_by(value)
    return AlertSample(str(alert), alert.metric, METRICS[alert.metric].unit, gpu_index, value, is_fired)
