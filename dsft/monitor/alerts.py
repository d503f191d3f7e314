"""Limits that a user sets, such as `vram>95`, and whether a sample passes them."""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dsft.core.errors import ConfigError
from dsft.core.units import GIB
from dsft.monitor.sample import AlertSample, GpuSample, HostSample, Sample


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


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100 * part / whole


def _gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / GIB


def _vram_percent(gpu: GpuSample) -> float | None:
    # What the driver reserves can't be had either: a card is full at 100.
    free = _percent(gpu.memory_free_bytes, gpu.memory_total_bytes)
    return None if free is None else 100 - free


METRICS = {
    "vram": _Metric("%", _vram_percent),
    "free": _Metric("GiB", lambda gpu: _gib(gpu.memory_free_bytes)),
    "util": _Metric("%", lambda gpu: gpu.gpu_utilization_percent),
    "bandwidth": _Metric("%", lambda gpu: gpu.memory_bandwidth_utilization_percent),
    "temp": _Metric("°C", lambda gpu: gpu.temperature_c),
    "memtemp": _Metric("°C", lambda gpu: gpu.memory_temperature_c),
    "power": _Metric("W", lambda gpu: gpu.power_w),
    "fan": _Metric("%", lambda gpu: gpu.fan_percent),
    "ecc": _Metric("errors", lambda gpu: gpu.ecc_uncorrected_errors),
    "cpu": _Metric("%", of_host=lambda host: host.cpu_percent),
    "ram": _Metric(
        "%",
        of_host=lambda host: (
            None
            if host.memory_available_bytes is None or not host.memory_total_bytes
            else 100 - 100 * host.memory_available_bytes / host.memory_total_bytes
        ),
    ),
    "swap": _Metric("%", of_host=lambda host: _percent(host.swap_used_bytes, host.swap_total_bytes)),
    "disk": _Metric("%", of_host=lambda host: _percent(host.disk_used_bytes, host.disk_total_bytes)),
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
