"""Figures of a GPU that have a limit, as bars with their history, and charts of the history alone."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsft.cli.views.drawing import draw_history
from dsft.cli.views.monitor.figures import format_figure, format_memory, format_share, heat_style, level_style
from dsft.cli.views.monitor.line import Line, join_fitting, labelled
from dsft.cli.views.monitor.state import GpuHistory, newest
from dsft.core.units import format_duration
from dsft.monitor.sample import GpuSample
from dsft.monitor.shares import to_percent, vram_percent

NARROW = 60
"""Below this many columns labels and figures are written shorter."""

_MAX_BAR_WIDTH, _MAX_ALONE_WIDTH = 48, 96
"""Of a bar with its history beside it, and of one without."""

_PAIR_GAP = 3
_MIN_SPARK_WIDTH = 8
_PERCENT_WIDTH = 5
_UTIL_STYLE = "cyan"
_NUM_CHARTS = 2
"""Of the meters, the first ones."""

_SCALE_WIDTH = 6


@dataclass(frozen=True)
class Meter:
    """A figure and how full it is.

    Attributes:
        label: What it is.
        short_label: The same in at most five letters.
        percent: Of its limit.
        figures: In words; empty where the percentage says it all.
        style: Of the bar.
        values: Its history.
        shows_percent: Whether the percentage is told beside the bar.
        rank: Of its row.
    """

    label: str
    short_label: str
    percent: float | None
    figures: str
    style: str
    values: deque[float | None] | None = None
    shows_percent: bool = True
    rank: int = 0


@dataclass(frozen=True)
class _Columns:
    label: int
    bar: int
    figures: int
    spark: int


def draw_meters(gpu: GpuSample, history: GpuHistory | None, width: int, *, has_charts: bool = False) -> list[Line]:
    """Draw memory, use, bandwidth, power and temperature, a row each; without the history of what has a chart."""
    columns = _lay_out(width, has_history=history is not None)
    meters = list(list_meters(gpu, history, " of " if width >= NARROW else "/"))
    if has_charts:
        meters[:_NUM_CHARTS] = [replace(meter, values=None) for meter in meters[:_NUM_CHARTS]]
    return [_draw_meter(meter, columns, width) for meter in meters]


def has_spark_columns(width: int, num_columns: int) -> bool:
    """Return whether rows of meters with a history leave so many columns at their right."""
    return _lay_out(width).spark >= num_columns


def draw_meter_pair(gpu: GpuSample, history: GpuHistory, width: int) -> list[Line]:
    """Draw memory and use in one row, or in two where it is narrow."""
    memory, util, *_ = list_meters(gpu, history, " of " if width >= NARROW else "/")
    if width < NARROW:
        return [_draw_meter(meter, _lay_out(width), width) for meter in (memory, util)]
    row = Line(rank=memory.rank)
    texts = [(meter, labelled(meter.label, ""), _draw_short(meter)) for meter in (memory, util)]
    room = width - _PAIR_GAP - sum(label.width + figures.width for _, label, figures in texts)
    bar = min(_MAX_BAR_WIDTH, room // 4)
    spark = room // 2 - bar
    for meter, label, figures in texts:
        row.add(" " * _PAIR_GAP if row.width else "").join(label)
        row.add_bar((meter.percent or 0) / 100, bar, meter.style)
        row.join(figures).add(_draw_spark(meter, spark), meter.style)
    return [row.clip(width)]


def draw_charts(gpu: GpuSample, history: GpuHistory, interval_s: float, width: int, height: int) -> list[Line]:
    """Draw charts of memory and use, one below the other."""
    memory, util, *_ = list_meters(gpu, history, " of ")
    above = (height + 1) // 2
    return [
        *_draw_chart(memory, interval_s, width, above),
        *_draw_chart(util, interval_s, width, height - above),
    ]


def list_meters(gpu: GpuSample, history: GpuHistory | None, of: str) -> Iterator[Meter]:
    """Give what a GPU has a limit for, memory and use first.

    Args:
        gpu: The GPU.
        history: Its last samples; None where there are none to be drawn.
        of: Stands between a value and its limit.
    """
    history = history or GpuHistory()
    memory = vram_percent(gpu)
    figures = format_memory(gpu.memory_used_bytes, gpu.memory_total_bytes, of)
    yield Meter("memory", "mem", memory, figures, level_style(memory), history.memory, rank=78)
    yield Meter("util", "util", gpu.gpu_utilization_percent, "", _UTIL_STYLE, history.util, rank=76)
    bandwidth = gpu.memory_bandwidth_utilization_percent
    yield Meter("bandwidth", "bandw", bandwidth, "", _UTIL_STYLE, history.bandwidth, rank=52)
    power = to_percent(gpu.power_w, gpu.power_limit_w)
    figures = format_share(gpu.power_w, gpu.power_limit_w, "W", of)
    yield Meter("power", "power", power, figures, "magenta", history.power, rank=72)
    heat = to_percent(gpu.temperature_c, gpu.temperature_slowdown_c)
    figures = format_share(gpu.temperature_c, gpu.temperature_slowdown_c, "°C", of)
    style = heat_style(gpu.temperature_c, gpu.temperature_slowdown_c)
    yield Meter("temp", "temp", heat, figures, style, shows_percent=False, rank=74)


def _lay_out(width: int, *, has_history: bool = True) -> _Columns:
    label, figures = (11, 18) if width >= NARROW else (6, 13)
    room = width - label - figures - _PERCENT_WIDTH - 2
    if width < NARROW:
        return _Columns(label, max(0, room), figures, 0)
    if not has_history:
        return _Columns(label, min(_MAX_ALONE_WIDTH, max(0, room)), figures, 0)
    bar = min(_MAX_BAR_WIDTH, room // 2)
    spark = room - bar - 2
    return _Columns(label, bar, figures, spark if spark >= _MIN_SPARK_WIDTH else 0)


def _draw_meter(meter: Meter, columns: _Columns, width: int) -> Line:
    label = meter.label if width >= NARROW else meter.short_label
    figures = Line(f"{meter.figures:>{columns.figures}}")
    if not meter.figures and columns.spark == 0:
        figures = Line(_draw_spark(meter, columns.figures), meter.style)
    fields = [
        (3, Line(f"{label:<{columns.label - 1}}", "dim")),
        (0, Line().add_bar((meter.percent or 0) / 100, columns.bar, meter.style)),
        (1 if not meter.figures else 4, figures),
        (2, _percent(meter)),
    ]
    row = join_fitting([field for field in fields if field[1].width], width, gap=" ", rank=meter.rank)
    if columns.spark and meter.values is not None:
        row.add("  ").add(_draw_spark(meter, columns.spark), meter.style)
    return row.clip(width)


def _draw_short(meter: Meter) -> Line:
    return Line(f" {meter.figures} " if meter.figures else " ").join(_percent(meter)).add("  ")


def _percent(meter: Meter) -> Line:
    text = format_figure(meter.percent, "%") if meter.shows_percent else ""
    return Line(f"{text:>{_PERCENT_WIDTH}}", "bold")


def _draw_spark(meter: Meter, width: int) -> str:
    return draw_history(newest(meter.values or (), width))[0] if width > 0 else ""


def _draw_chart(meter: Meter, interval_s: float, width: int, height: int) -> list[Line]:
    values = meter.values or ()
    width -= _SCALE_WIDTH
    caption = Line(f"{meter.label}, last {format_duration(min(len(values), width) * interval_s)}", "dim")
    shown = newest(values, width)
    rows = draw_history(shown, height - 1) if height > 1 else []
    marks = [""] * len(rows)
    if len(rows) > 1 and any(value is not None for value in shown):
        marks[0], marks[-1] = "100 %", "0 %"
    scales = [Line(f"{mark:>{_SCALE_WIDTH - 1}} ", "dim") for mark in marks]
    return [caption, *(scale.add(row, meter.style) for scale, row in zip(scales, rows, strict=True))]
