"""Limits that a user sets, such as `vram>95`, and whether a sample passes them."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dsft.core.errors import ConfigError
from dsft.core.units import GIB
from dsft.monitor.sample import AlertSample, GpuSample, HostSample, MigSample, Sample
from dsft.monitor.shares import disk_percent, ram_percent, swap_percent, vram_percent


@dataclass(frozen=True)
class _Metric:
    """Something a limit can be set for.

    Attributes:
        unit: Of the limit.
        of_gpu: Reads it from a GPU; None for the host's.
        of_host: Reads it from the host; None for a GPU's.
        of_mig: Reads it from a MIG instance; None for what the driver tells of whole GPUs alone.
        most: The greatest value there can be; None where there is no such limit.
        least: The least value there can be; None where there is no such limit.
    """

    unit: str
    of_gpu: Callable[[GpuSample], float | None] | None = None
    of_host: Callable[[HostSample], float | None] | None = None
    of_mig: Callable[[MigSample], float | None] | None = None
    most: float | None = None
    least: float | None = 0.0


def _free_gib(device: GpuSample | MigSample) -> float | None:
    return None if device.memory_free_bytes is None else device.memory_free_bytes / GIB


def _swap_percent(host: HostSample) -> float | None:
    return 0.0 if host.swap_total_bytes == 0 else swap_percent(host)  # a limit on swap holds where there is none


METRICS = {
    "vram": _Metric("%", vram_percent, of_mig=vram_percent, most=100),
    "free": _Metric("GiB", _free_gib, of_mig=_free_gib),
    "util": _Metric("%", lambda gpu: gpu.gpu_utilization_percent, most=100),
    "bandwidth": _Metric("%", lambda gpu: gpu.memory_bandwidth_utilization_percent, most=100),
    "temp": _Metric("°C", lambda gpu: gpu.temperature_c, least=None),
    "memtemp": _Metric("°C", lambda gpu: gpu.memory_temperature_c, least=None),
    "power": _Metric("W", lambda gpu: gpu.power_w),
    "fan": _Metric("%", lambda gpu: gpu.fan_percent),
    "ecc": _Metric("errors", lambda gpu: gpu.ecc_uncorrected_errors),
    "cpu": _Metric("%", of_host=lambda host: host.cpu_percent, most=100),
    "ram": _Metric("%", of_host=ram_percent, most=100),
    "swap": _Metric("%", of_host=_swap_percent, most=100),
    "disk": _Metric("%", of_host=disk_percent, most=100),
}
"""By the name it has in a limit."""

_MISTAKEN_NAMES = {"memory": "vram", "mem": "vram"}
"""What else a metric is called, and its name."""

_UNITS = {"%": {"%"}, "GiB": {"gib"}, "°C": {"c", "°c"}, "W": {"w"}, "errors": {"error", "errors"}}
"""How a unit may be written behind a limit."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

_FORM = re.compile(
    r"\s*(?P<metric>[a-z]+)\s*(?P<comparison>>=|<=|>|<)\s*(?P<limit>\d+(?:\.\d+)?|\.\d+)"
    r"\s*(?P<unit>%|°?[a-z]+)?\s*"
)


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

    @property
    def can_fire(self) -> bool:
        """Whether any value there can be makes it fire."""
        metric = METRICS[self.metric]
        extreme = metric.most if self.comparison.startswith(">") else metric.least
        return extreme is None or self.is_passed_by(extreme)


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
        meant = _MISTAKEN_NAMES.get(form["metric"])
        hint = f"Memory of a GPU in use is {meant}, in %; memory that is free is free, in GiB." if meant else ""
        raise ConfigError(
            f"--alert {text!r} names {form['metric']!r}, which is not known.", hint or f"Known are {names}."
        )
    alert = Alert(form["metric"], form["comparison"], float(form["limit"]))
    _check(alert, text, form["unit"])
    return alert


def _check(alert: Alert, text: str, unit: str | None) -> None:
    """Refuse a limit in a unit that is not its metric's, and one that no value can pass."""
    metric = METRICS[alert.metric]
    if unit is not None and unit not in _UNITS[metric.unit]:
        raise ConfigError(
            f"--alert {text!r} is in {unit!r}, and {alert.metric} counts in {metric.unit}.",
            "Give the limit in that unit, or a number alone.",
        )
    if not alert.can_fire:
        extreme = f"above {metric.most:g}" if alert.comparison.startswith(">") else f"below {metric.least:g}"
        raise ConfigError(
            f"--alert {text!r} can never be passed: {alert.metric} is never {extreme} {metric.unit}.",
            "Set a limit that it can pass, e.g. --alert 'vram>95'.",
        )


def judge(alerts: Iterable[Alert], sample: Sample) -> tuple[AlertSample, ...]:
    """Return each limit on each GPU or MIG instance, or once for the host's values, in the order of the limits."""
    judged: list[AlertSample] = []
    for alert in alerts:
        metric = METRICS[alert.metric]
        if metric.of_host is not None:
            value = metric.of_host(sample.host) if sample.host is not None else None
            judged.append(_judge_value(alert, value))
        for gpu in sample.gpus:
            judged += _judge_gpu(alert, gpu)
    return tuple(judged)


def _judge_gpu(alert: Alert, gpu: GpuSample) -> Iterator[AlertSample]:
    metric = METRICS[alert.metric]
    if metric.of_mig is not None and gpu.is_mig_enabled and gpu.migs:
        # Programs see the instances alone: one may be full in a GPU that has room.
        for mig in gpu.migs:
            yield _judge_value(alert, metric.of_mig(mig), gpu.index, mig.index)
    elif metric.of_gpu is not None:
        yield _judge_value(alert, metric.of_gpu(gpu), gpu.index)


def _judge_value(
    alert: Alert, value: float | None, gpu_index: int | None = None, mig_index: int | None = None
) -> AlertSample:
    is_fired = None if value is None else alert.is_passed_by(value)
    told = None if value is None else _round(value, alert)
    return AlertSample(str(alert), alert.metric, METRICS[alert.metric].unit, gpu_index, told, is_fired, mig_index)


def _round(value: float, alert: Alert) -> float:
    """Return a value without digits that tell nothing, on the side of the limit on which it is."""
    for digits in range(1 if METRICS[alert.metric].unit == "%" else 2, 12):
        rounded = round(value, digits)
        if alert.is_passed_by(rounded) == alert.is_passed_by(value):
            return rounded
    return value
