"""GPUs on the monitor's screen as a table: a row for each, for many GPUs or a small terminal."""

from rich.cells import cell_len

from dsft.cli.views.monitor.figures import MISSING, format_figure, format_memory, format_share, heat_style, level_style
from dsft.cli.views.monitor.gpu_facts import describe_ecc, describe_throttle, is_braked, name_mig
from dsft.cli.views.monitor.line import Line, clip_text, join_fitting, printable
from dsft.monitor.sample import GpuSample
from dsft.monitor.shares import vram_percent

GPU_ROW_RANK = 80
"""Of each GPU's first row, and of no other row."""

_SECOND_ROW_RANK, _BRAKE_RANK, _HEADER_RANK, _MIG_RANK = 78, 75, 30, 20
_MAX_BAR_WIDTH, _MAX_NAME_WIDTH = 40, 30
_MIN_BAR_WIDTH, _MIN_NAME_WIDTH = 4, 6
_FIGURES_WIDTH = 45
"""Of the columns beside bar, name, bandwidth and what holds a GPU back."""

_INDEX_WIDTH, _MEMORY_WIDTH, _UTIL_WIDTH, _BANDWIDTH_WIDTH, _TEMPERATURE_WIDTH, _POWER_WIDTH = 3, 13, 5, 9, 5, 9
_BANDWIDTH_FROM = 100
"""From this many columns on there is room for the use of the memory's bandwidth."""

_THROTTLE_WIDTH = 22
_VENDOR = "NVIDIA "


def draw_gpu_rows(gpus: tuple[GpuSample, ...], width: int) -> list[Line]:
    """Draw a row for each GPU, its brake in a row below where there is no room beside it; names above, of several."""
    room = width - _FIGURES_WIDTH - _THROTTLE_WIDTH - (_BANDWIDTH_WIDTH + 2 if width >= _BANDWIDTH_FROM else 0)
    longest = max((cell_len(_short_name(gpu)) for gpu in gpus), default=0)
    name_width = min(_MAX_NAME_WIDTH, max(_MIN_NAME_WIDTH, room // 2), longest)
    bar_width = max(_MIN_BAR_WIDTH, min(_MAX_BAR_WIDTH, room - name_width - 2))
    rows = [_draw_header(name_width, bar_width, width)] if len(gpus) > 1 and width >= _FIGURES_WIDTH else []
    for gpu in gpus:
        rows += _draw_gpu(gpu, name_width, bar_width, width)
        for mig in gpu.migs:
            memory = format_memory(mig.memory_used_bytes, mig.memory_total_bytes, "/")
            name = Line(f"   {name_mig(mig)}  ", "dim", _MIG_RANK)
            rows.append(name.add(memory).clip(width))
    return rows


def add_num_hidden(row: Line, gpu: GpuSample, num_hidden: int, width: int) -> Line:
    """Return the first row of a GPU with how many GPUs below it had no room; bar and name leave first for that."""
    is_short = width < _FIGURES_WIDTH - 15 or 0 <= width - _FIGURES_WIDTH < 10
    note = Line(f" +{num_hidden}" if is_short else f"  +{num_hidden} more", "yellow")
    room = width - note.width
    if row.width <= room or _is_wide(width) or gpu.problem is not None:
        row = Line().join(row)
    elif width < _FIGURES_WIDTH:
        row = _draw_in_two_rows(gpu, _draw_index(gpu), room)[0]
    else:
        row = _join(_draw_index(gpu), Line(), Line(), _list_figures(gpu, width), room)
    row = row.clip(room).fill(room).join(note).clip(width)
    row.rank = GPU_ROW_RANK
    return row


def _draw_index(gpu: GpuSample) -> Line:
    return Line(f"{gpu.index:>{_INDEX_WIDTH}}", "bold cyan")


def _draw_gpu(gpu: GpuSample, name_width: int, bar_width: int, width: int) -> list[Line]:
    index = _draw_index(gpu)
    name = Line(clip_text(_short_name(gpu), name_width)).fill(name_width)
    if gpu.problem is not None:
        problem = Line(printable(gpu.problem.found), "bold red")
        row = Line(rank=GPU_ROW_RANK).join(index).add(" ").join(name).add("  ").join(problem)
        return [row.clip(width)]
    if width < _FIGURES_WIDTH:
        rows = _draw_in_two_rows(gpu, index, width)
    else:
        bar = Line().add_bar(_fraction(gpu), bar_width, level_style(100 * _fraction(gpu)))
        rows = [_join(index, name, bar, _list_figures(gpu, width), width)]
    trouble = _describe_trouble(gpu)
    if _is_wide(width):
        rows[0].add("  ").join(trouble).clip(width)
    elif is_braked(gpu) or gpu.ecc_uncorrected_errors:
        rows.append(Line(" " * (_INDEX_WIDTH + 1), rank=_BRAKE_RANK).join(trouble).clip(width))
    return rows


def _draw_header(name_width: int, bar_width: int, width: int) -> Line:
    figures = [
        Line(f"{'memory':>{_MEMORY_WIDTH}}"),
        Line(f"{'util':>{_UTIL_WIDTH}}"),
        *([Line(f"{'bandwidth':>{_BANDWIDTH_WIDTH}}")] if width >= _BANDWIDTH_FROM else []),
        Line(f"{'temp':>{_TEMPERATURE_WIDTH}}"),
        Line(f"{'power':>{_POWER_WIDTH}}"),
    ]
    row = _join(Line("GPU"), Line(" " * name_width), Line(" " * bar_width), figures, width)
    if _is_wide(width):
        row.add("  throttle").clip(width)
    row.parts = [(row.plain, "dim")]
    row.rank = _HEADER_RANK
    return row


def _join(index: Line, name: Line, bar: Line, figures: list[Line], width: int) -> Line:
    fields = [(3, index), (1, name), (0, bar), *((2, figure) for figure in figures)]
    return join_fitting(fields, width, gap="  " if _is_wide(width) else " ", rank=GPU_ROW_RANK)


def _is_wide(width: int) -> bool:
    return width >= _FIGURES_WIDTH + _THROTTLE_WIDTH


def _draw_in_two_rows(gpu: GpuSample, index: Line, width: int) -> list[Line]:
    memory = format_memory(gpu.memory_used_bytes, gpu.memory_total_bytes, "/")
    bar_width = max(0, min(_MAX_BAR_WIDTH, width - index.width - len(memory) - 2))
    bar = Line().add_bar(_fraction(gpu), bar_width, level_style(100 * _fraction(gpu)))
    fields = [(2, index), (0, bar), (1, Line(memory, "bold"))]
    figures = [
        (2, Line(f"   {format_figure(gpu.gpu_utilization_percent, '%')}", "cyan")),
        (1, _draw_temperature(gpu)),
        (0, Line(format_figure(gpu.power_w, "W"))),
    ]
    first = join_fitting([field for field in fields if field[1].width], width, gap=" ", rank=GPU_ROW_RANK)
    return [first, join_fitting(figures, width, gap=" ", rank=_SECOND_ROW_RANK)]


def _list_figures(gpu: GpuSample, width: int) -> list[Line]:
    memory = format_memory(gpu.memory_used_bytes, gpu.memory_total_bytes, "/")
    bandwidth = format_figure(gpu.memory_bandwidth_utilization_percent, "%")
    return [
        Line(f"{memory:>{_MEMORY_WIDTH}}", "bold"),
        Line(f"{format_figure(gpu.gpu_utilization_percent, '%'):>{_UTIL_WIDTH}}", "cyan"),
        *([Line(f"{bandwidth:>{_BANDWIDTH_WIDTH}}", "cyan")] if width >= _BANDWIDTH_FROM else []),
        _draw_temperature(gpu),
        Line(f"{format_share(gpu.power_w, gpu.power_limit_w, 'W', '/'):>{_POWER_WIDTH}}"),
    ]


def _draw_temperature(gpu: GpuSample) -> Line:
    style = heat_style(gpu.temperature_c, gpu.temperature_slowdown_c)
    return Line(f"{format_figure(gpu.temperature_c, '°C'):>{_TEMPERATURE_WIDTH}}", style)


def _fraction(gpu: GpuSample) -> float:
    return (vram_percent(gpu) or 0) / 100


def _describe_trouble(gpu: GpuSample) -> Line:
    throttle = describe_throttle(gpu)
    return describe_ecc(gpu).add(" · ", "dim").join(throttle) if gpu.ecc_uncorrected_errors else throttle


def _short_name(gpu: GpuSample) -> str:
    return printable(gpu.name or MISSING).removeprefix(_VENDOR)
