"""One GPU on the monitor's screen: a row for each figure, with charts or without, or few dense rows."""

from dsft.cli.views.monitor.figures import format_figure, format_memory, format_share, level_style
from dsft.cli.views.monitor.gpu_bars import NARROW, draw_charts, draw_meter_pair, draw_meters, has_spark_columns
from dsft.cli.views.monitor.gpu_facts import (
    describe_clocks,
    describe_driver,
    describe_ecc,
    describe_heat,
    describe_mode,
    describe_name,
    describe_pcie,
    describe_temperature,
    describe_throttle,
    is_braked,
    name_mig,
)
from dsft.cli.views.monitor.line import (
    Line,
    draw_heading,
    fits_in_heading,
    flow_lines,
    join_fitting,
    labelled,
    wrap_words,
)
from dsft.cli.views.monitor.state import GpuHistory
from dsft.monitor.sample import DriverSample, GpuSample, MigSample, Problem
from dsft.monitor.shares import vram_percent

CHARTS_WIDTH = 130
"""From this many columns on there is room for charts beside the figures."""

_FIGURES_WIDTH = 74
"""Of the rows that charts stand beside."""

_CHART_GAP = 3
_HEADING_RANK, _FACTS_RANK, _THROTTLE_RANK, _BRAKE_RANK = 55, 42, 50, 75
_MIG_NAME_WIDTH, _MIG_FIGURES_WIDTH, _MAX_MIG_BAR_WIDTH = 22, 18, 40


def draw_gpu(gpu: GpuSample, history: GpuHistory | None, width: int, driver: DriverSample | None = None) -> list[Line]:
    """Draw a GPU with a row for each figure, and its history beside it where there is one.

    Args:
        gpu: The GPU.
        history: Its last samples.
        width: Of the rows.
        driver: Told in the heading, if there is room.
    """
    return [_draw_heading(gpu, width, driver), *_draw_figures(gpu, history, width), *_draw_migs(gpu, width)]


def draw_gpu_with_charts(
    gpu: GpuSample,
    history: GpuHistory,
    interval_s: float,
    width: int,
    num_more_rows: int = 0,
    driver: DriverSample | None = None,
) -> list[Line]:
    """Draw a GPU with a row for each figure, and charts of memory and use beside them.

    Args:
        gpu: The GPU.
        history: Its last samples.
        interval_s: Time between them.
        width: Of the rows.
        num_more_rows: By how many rows the charts are higher than the figures.
        driver: Told in the heading, if there is room.
    """
    if gpu.problem is not None:
        return draw_gpu(gpu, history, width, driver)
    figures = _draw_figures(gpu, history, _FIGURES_WIDTH, has_charts=True) + [Line() for _ in range(num_more_rows)]
    room = _FIGURES_WIDTH + _CHART_GAP
    charts = draw_charts(gpu, history, interval_s, width - room, len(figures))
    rows = [row.clip(_FIGURES_WIDTH).fill(room).join(chart) for row, chart in zip(figures, charts, strict=True)]
    return [_draw_heading(gpu, width, driver), *rows, *_draw_migs(gpu, width)]


def draw_dense_gpu(gpu: GpuSample, history: GpuHistory, width: int, driver: DriverSample | None = None) -> list[Line]:
    """Draw a GPU in few rows, with the driver in the heading, if there is room."""
    rows = [_draw_heading(gpu, width, driver)]
    if gpu.problem is not None:
        return rows + draw_problem(gpu.problem, width)
    rows += draw_meter_pair(gpu, history, width)
    power = labelled("power", format_share(gpu.power_w, gpu.power_limit_w, "W"))
    bandwidth = labelled("bandwidth", format_figure(gpu.memory_bandwidth_utilization_percent, "%"))
    fan = labelled("fan", format_figure(gpu.fan_percent, "%"))
    rows += flow_lines([describe_temperature(gpu), power, bandwidth, fan], width, rank=74)
    rest = [*describe_clocks(gpu, is_short=True)[:1], *describe_pcie(gpu, is_short=True)[:1], describe_ecc(gpu)]
    rows += _draw_throttle(gpu, width, [] if width < NARROW else rest)
    if width < NARROW:
        rows += flow_lines(rest, width, rank=_FACTS_RANK)
    return rows + _draw_migs(gpu, width)


def draw_problem(problem: Problem, width: int) -> list[Line]:
    """Say why a GPU, or all of them, can't be read, and what to do."""
    return [*wrap_words(problem.found, width, "bold red", rank=79), *wrap_words(problem.fix, width, rank=61)]


def _draw_heading(gpu: GpuSample, width: int, driver: DriverSample | None) -> Line:
    title, mode = describe_name(gpu), describe_mode(gpu)
    full = describe_driver(driver)
    full.add(" · " if full.width and mode.width else "", "dim").join(mode)
    note = full if fits_in_heading(title, full, width) else mode
    return draw_heading(title, width, note, rank=_HEADING_RANK)


def _draw_figures(gpu: GpuSample, history: GpuHistory | None, width: int, *, has_charts: bool = False) -> list[Line]:
    if gpu.problem is not None:
        return draw_problem(gpu.problem, width)
    rows = draw_meters(gpu, history, width, has_charts=has_charts)
    is_narrow = width < NARROW
    facts = [*describe_clocks(gpu, is_short=is_narrow), *describe_pcie(gpu, is_short=is_narrow)]
    heat = flow_lines(describe_heat(gpu), width)
    if history is not None and len(heat) == 1 and has_spark_columns(width, heat[0].width):
        rows[-1].add("  ").join(heat[0])  # the temperature has no history in its row
    else:
        facts += describe_heat(gpu)
    if is_narrow:
        facts.append(describe_ecc(gpu))
    rows += flow_lines(facts, width, rank=_FACTS_RANK)
    return rows + _draw_throttle(gpu, width, [] if is_narrow else [describe_ecc(gpu)])


def _draw_throttle(gpu: GpuSample, width: int, others: list[Line]) -> list[Line]:
    words = labelled("throttle", "").join(describe_throttle(gpu))
    return flow_lines([words, *others], width, rank=_BRAKE_RANK if is_braked(gpu) else _THROTTLE_RANK)


def _draw_migs(gpu: GpuSample, width: int) -> list[Line]:
    return [_draw_mig(mig, width) for mig in gpu.migs]


def _draw_mig(mig: MigSample, width: int) -> Line:
    percent = vram_percent(mig)
    figures = format_memory(mig.memory_used_bytes, mig.memory_total_bytes)
    name = Line(f"  {name_mig(mig)}", "cyan").fill(_MIG_NAME_WIDTH)
    bar_width = max(4, min(_MAX_MIG_BAR_WIDTH, width - name.width - _MIG_FIGURES_WIDTH - 8))
    fields = [
        (3, name),
        (0, Line().add_bar((percent or 0) / 100, bar_width, level_style(percent))),
        (2, Line(f"{figures:>{_MIG_FIGURES_WIDTH}}")),
        (1, Line(f"{format_figure(percent, '%'):>5}", "bold")),
    ]
    return join_fitting(fields, width, gap=" ", rank=51)
