"""The host on the monitor's screen: processor, memory, disk and swap."""

import math
from collections.abc import Sequence

from dsft.cli.views.monitor.figures import MISSING, format_figure, format_memory, format_rate, level_style
from dsft.cli.views.monitor.line import (
    Line,
    draw_heading,
    fits_in_heading,
    flow_lines,
    join_fitting,
    labelled,
    printable,
)
from dsft.core.units import GIB
from dsft.monitor.sample import HostSample
from dsft.monitor.shares import disk_percent, ram_percent, swap_percent

_MIN_CELL_WIDTH, _CELL_GAP = 37, 3
_LABEL_WIDTH, _PERCENT_WIDTH, _FIGURES_WIDTH = 5, 5, 16
_MIN_BAR_WIDTH, _MAX_BAR_WIDTH = 4, 30
_RANK, _HEADING_RANK = 45, 30
_LARGE_BYTES = 100 * GIB
"""From here on figures have no decimals."""


def draw_host(host: HostSample, width: int, about: Sequence[str] = ()) -> list[Line]:
    """Draw the host with bars, in as many columns as there is room for.

    Args:
        host: The host.
        width: Of the rows.
        about: What else is told in its heading, the first of it most of all, as far as there is room.
    """
    meters = _list_meters(host)
    num_columns = max(1, min(len(meters), (width + _CELL_GAP) // (_MIN_CELL_WIDTH + _CELL_GAP)))
    num_columns = math.ceil(len(meters) / math.ceil(len(meters) / num_columns))  # as even as it can be
    cell_width = (width - _CELL_GAP * (num_columns - 1)) // num_columns
    rows = [_draw_heading(host, width, about)]
    for first in range(0, len(meters), num_columns):
        row = Line(rank=_RANK)
        for column, (label, percent, figures) in enumerate(meters[first : first + num_columns]):
            row.fill(column * (cell_width + _CELL_GAP)).join(_draw_meter(label, percent, figures, cell_width))
        rows.append(row.clip(width))
    return rows


def _draw_heading(host: HostSample, width: int, about: Sequence[str]) -> Line:
    title, traffic = Line("host", "bold cyan"), _describe_traffic(host)
    gap = " "
    for words in about:
        longer = Line().join(title).add(f"{gap}{printable(words)}", "bold" if gap == " " else "dim")
        if fits_in_heading(longer, traffic, width):
            title, gap = longer, " · "
    return draw_heading(title, width, traffic, rank=_HEADING_RANK)


def draw_brief_host(host: HostSample, width: int, name: str = "") -> list[Line]:
    """Draw the host in one row, with its name if there is room."""
    parts = [
        labelled(label, format_figure(percent, "%"), level_style(percent)) for label, percent, _ in _list_meters(host)
    ]
    if width < _MIN_CELL_WIDTH:
        return flow_lines(parts, width, rank=_RANK)[:1]
    row, *rest = flow_lines([Line("host", "bold cyan"), *parts], width, rank=_RANK)
    name_line = Line(" · ", "dim").add(printable(name), "bold")
    return [row.join(name_line) if name and not rest and row.width + name_line.width <= width else row]


def _list_meters(host: HostSample) -> list[tuple[str, float | None, str]]:
    cpu = ""
    if host.num_cpus is not None:
        cpu = f"{host.num_cpus} CPUs" if host.num_cpus != 1 else "1 CPU"
    meters = [
        ("CPU", host.cpu_percent, cpu),
        ("RAM", ram_percent(host), _format_memory(host.memory_used_bytes, host.memory_total_bytes)),
        ("disk", disk_percent(host), _format_memory(host.disk_used_bytes, host.disk_total_bytes)),
    ]
    if host.swap_total_bytes == 0:
        return [*meters, ("swap", 0.0, "none")]
    return [*meters, ("swap", swap_percent(host), _format_memory(host.swap_used_bytes, host.swap_total_bytes))]


def _format_memory(used_bytes: int | None, total_bytes: int | None) -> str:
    digits = 1 if total_bytes is None or total_bytes < _LARGE_BYTES else 0
    return format_memory(used_bytes, total_bytes, digits=digits)


def _draw_meter(label: str, percent: float | None, figures: str, width: int) -> Line:
    percentage = f"{format_figure(percent, '%'):>{_PERCENT_WIDTH}}"
    room = width - _LABEL_WIDTH - _PERCENT_WIDTH - _FIGURES_WIDTH - 2
    fields = [
        (3, Line(f"{label:<{_LABEL_WIDTH - 1}}", "dim")),
        (0, Line().add_bar((percent or 0) / 100, max(_MIN_BAR_WIDTH, min(_MAX_BAR_WIDTH, room)), level_style(percent))),
        (2, Line(percentage, "bold")),
        (1, Line(figures)),
    ]
    return join_fitting(fields, width, gap=" ")


def _describe_traffic(host: HostSample) -> Line:
    line = labelled("load", MISSING if host.load_average_1_min is None else f"{host.load_average_1_min:.1f}")
    line.add(" · ", "dim").join(labelled("disk reads", format_rate(host.disk_read_bytes_per_s)))
    return line.add(" · ", "dim").join(labelled("writes", format_rate(host.disk_write_bytes_per_s)))
