"""What a bench found, as a table, as lines about each row, and as Markdown."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsft.bench.comparison import RowComparison
from dsft.bench.figures import Speed
from dsft.bench.options import Progress
from dsft.bench.result import BenchResult, PlanFigures, RowResult
from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import count_nouns, format_step_time
from dsft.core.units import GIB, format_count, format_duration, format_gib

_MOST_ROWS_IN_DETAIL = 4
"""More rows than these are a grid, whose table says enough."""

_SET_NAMES = {"fitted": "fitted", "held_out": "held out"}

_FIGURES = ("allocated", "reserved", "device")

_NOTHING = "–"


def render_bench(result: BenchResult, comparisons: Sequence[RowComparison] | None = None) -> RenderableType:
    """Draw a result.

    Args:
        result: What was found.
        comparisons: Its rows against an earlier result.
    """
    parts: list[RenderableType] = [Text(_describe_setting(result), "dim"), _draw_table(result)]
    parts += [_draw_reason(row) for row in result.rows if row.reason is not None]
    if len(result.rows) <= _MOST_ROWS_IN_DETAIL:
        parts += [_draw_details(row) for row in result.rows if row.status == "done"]
    else:
        parts += [Text(f"{row.name}: {notice}", "yellow") for row in result.rows for notice in row.notices]
        parts.append(Text(_describe_data(result)))
    parts += [Text(line) for line in _describe_sets(result)]
    if comparisons is not None:
        parts.append(_draw_comparisons(comparisons))
    return AsciiFallback(Group(*parts))


def format_markdown(result: BenchResult, comparisons: Sequence[RowComparison] | None = None) -> str:
    """Return a result as Markdown, with every figure of the table and of the memory predictions."""
    header = (
        "configuration", "plan", "tok/s", "padded", "targets", "step, median (min to max)", "epoch",
        *(f"{figure}: predicted / measured GiB, error" for figure in ("reserved", "device")),
        "of the ceiling", "plain path",
    )  # fmt: skip
    lines = [_describe_setting(result), "", _markdown_row(header), _markdown_row(["---"] * len(header))]
    lines += [_markdown_row(_markdown_cells(row)) for row in result.rows]
    lines += ["", _describe_data(result)]
    for row in result.rows:
        if row.time is not None:
            lines += ["", f"{row.name}, where the time of a step goes: {_describe_time(row)}."]
    for line in _describe_sets(result):
        lines += ["", line]
    if comparisons:
        lines += ["", _markdown_row(_COMPARISON_HEADER), _markdown_row(["---"] * len(_COMPARISON_HEADER))]
        lines += [_markdown_row(_comparison_cells(row)) for row in comparisons]
    elif comparisons is not None:
        lines += ["", _NO_COMPARISON]
    return "\n".join(lines)


def describe_progress(progress: Progress) -> str:
    """Return where a bench is in one line."""
    parts = [f"row {progress.row} of {progress.num_rows}", progress.name] if progress.row else []
    step = f", step {progress.step} of {progress.num_steps}" if progress.step else ""
    return " · ".join([*parts, progress.phase + step])


def describe_row(row: RowResult) -> str:
    """Return what a row came to in one line."""
    if row.speed is None:
        return f"{row.name}: {row.reason}"
    memory = f", {format_gib(row.measured.reserved_bytes)} reserved" if row.measured is not None else ""
    return f"{row.name}: {format_count(row.speed.tok_per_s)} tok/s{memory}"


# The table

_COLUMNS = ("configuration", "plan", "tok/s", "step", "GiB reserved", "on device", "epoch", "of ceiling", "vs plain")

_NUM_ALWAYS_SHOWN = 4
"""Columns after these are left out where no row has anything in them."""


def _draw_table(result: BenchResult) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    rows = [_table_cells(row) for row in result.rows]
    shown = [
        index
        for index in range(len(_COLUMNS))
        if index < _NUM_ALWAYS_SHOWN or any(row[index] != _NOTHING for row in rows)
    ]
    for index in shown:
        table.add_column(_COLUMNS[index], justify="left" if index < 2 else "right", overflow="fold")
    for row, cells in zip(result.rows, rows, strict=True):
        table.add_row(*(Text(cells[index]) for index in shown), style="" if row.status == "done" else "yellow")
    return table


def _table_cells(row: RowResult) -> list[str]:
    plan = _describe_plan(row.plan) if row.plan is not None else _NOTHING
    if row.speed is None:
        return [row.name, plan, row.status.replace("_", " "), *[_NOTHING] * (len(_COLUMNS) - 3)]
    return [
        row.name,
        plan,
        format_count(row.speed.tok_per_s),
        format_step_time(row.speed.step_s.median),
        _memory_cell(row, "reserved"),
        _memory_cell(row, "device"),
        format_duration(row.epoch_s) if row.epoch_s is not None else _NOTHING,
        f"{row.ceiling_share * 100:.0f} %" if row.ceiling_share is not None else _NOTHING,
        _speedup_cell(row),
    ]


def _memory_cell(row: RowResult, figure: str) -> str:
    measured = getattr(row.measured, f"{figure}_bytes", None)
    if measured is None:
        return _NOTHING
    error = row.error_percent.get(figure)
    return f"{measured / GIB:.2f}" + (f" ({error:+.1f} %)" if error is not None else "")


def _speedup_cell(row: RowResult) -> str:
    if row.baseline is None:
        return _NOTHING
    if row.baseline.speedup is None:
        return row.baseline.status.replace("_", " ")
    return f"{row.baseline.speedup:.2f}×"


def _describe_plan(plan: PlanFigures) -> str:
    sequences = count_nouns(plan.micro_batch_size, "sequence")
    tokens = f"{format_count(plan.micro_batch_tokens)} tokens"
    parts = [tokens if plan.splits_by_tokens else sequences, f"{plan.num_recomputed}/{plan.num_blocks} recompute"]
    return " · ".join([*parts, "paged"] if plan.pages_optimizer else parts)


# Below the table


def _draw_reason(row: RowResult) -> Text:
    return Text.assemble(("✗ ", "yellow"), (row.name, "bold"), f": {row.reason}")


def _draw_details(row: RowResult) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column(style="dim", min_width=8)
    table.add_column(overflow="fold")
    for name, text in _detail_lines(row):
        table.add_row(name, Text(text))
    return Group(Text(f"\n{row.name}", "bold cyan"), table)


def _detail_lines(row: RowResult) -> list[tuple[str, str]]:
    lines = [("data", str(row.data)), ("kernels", f"{row.precision}, {row.attention}"), ("blocks", str(row.blocks))]
    if row.speed is not None:
        lines += _speed_lines(row.speed)
    if row.measured is not None:
        lines += [("memory", text) for text in _memory_lines(row)]
    elif row.host_bytes is not None:
        lines.append(("memory", f"{format_gib(row.host_bytes)} of host memory"))
    if row.epoch_s is not None:
        lines.append(("epoch", f"{format_duration(row.epoch_s)}, validation and checkpoints not counted"))
    if row.ceiling_flops is not None and row.useful_flops is not None:
        share = (
            f"{row.useful_flops / row.ceiling_flops * 100:.0f} % of what the model's matrix products alone reach here"
        )
        lines.append(("ceiling", f"{row.useful_flops / 1e12:.3g} of {row.ceiling_flops / 1e12:.3g} TFLOP/s, {share}"))
    if row.time is not None:
        lines.append(("time", _describe_time(row)))
    if row.baseline is not None:
        lines.append(("plain", _describe_baseline(row)))
    return [*lines, *(("note", notice) for notice in row.notices)]


def _speed_lines(speed: Speed) -> list[tuple[str, str]]:
    step = speed.step_s
    rates = f"{format_count(speed.tok_per_s)} tok/s, {format_count(speed.target_tok_per_s)} of them targets"
    if round(speed.padded_tok_per_s) != round(speed.tok_per_s):
        rates += f"; {format_count(speed.padded_tok_per_s)} counted with padding"
    spread = (
        f"{step.median:.3f} s median, middle half {step.q1:.3f} to {step.q3:.3f}, "
        f"all {step.min:.3f} to {step.max:.3f} ({count_nouns(len(speed.steps), 'step')})"
    )
    return [("speed", rates), ("step", spread)]


def _memory_lines(row: RowResult) -> list[str]:
    lines = []
    for figure in _FIGURES:
        measured = getattr(row.measured, f"{figure}_bytes")
        if measured is None:
            continue
        line = f"{figure}: {measured / GIB:.2f} GiB"
        if row.predicted is not None and figure in row.error_percent:
            predicted = getattr(row.predicted, f"{figure}_bytes")
            line += f", predicted {predicted / GIB:.2f} ({row.error_percent[figure]:+.2f} %)"
        lines.append(line)
    return lines


def _describe_baseline(row: RowResult) -> str:
    baseline = row.baseline
    if baseline is None or baseline.speed is None:
        return str(baseline.reason if baseline is not None else _NOTHING)
    memory = f", {format_gib(baseline.measured.reserved_bytes)} reserved" if baseline.measured is not None else ""
    speed, step = format_count(baseline.speed.tok_per_s), format_step_time(baseline.speed.step_s.median)
    return f"{speed} tok/s, {step} a step{memory}; dsft is {baseline.speedup:.2f}× as fast"


def _describe_time(row: RowResult) -> str:
    if row.time is None:
        return _NOTHING
    shares = ", ".join(f"{kind} {share * 100:.0f} %" for kind, share in row.time.shares.items())
    return shares + (" (wall clock)" if row.time.source == "wall clock" else "")


def _describe_setting(result: BenchResult) -> str:
    names = ("dsft", "torch", "transformers", "peft", "bitsandbytes", "cuda", "driver")
    versions = ", ".join(f"{name} {result.versions[name]}" for name in names if name in result.versions)
    done = f"{len(result.rows)} of {count_nouns(result.num_rows, 'row')}"
    steps = f"{count_nouns(result.num_steps, 'step')} each after {result.num_warmup_steps} to warm up"
    memory = ""
    if result.device.used_before_bytes is not None:
        memory = f" ({format_gib(result.device.used_before_bytes)} in use before)"
    return f"{result.device.name}{memory}; {done}, {steps}; {versions}"


def _describe_data(result: BenchResult) -> str:
    return f"Data: {'; '.join(dict.fromkeys(row.data for row in result.rows if row.data is not None)) or 'none'}."


def _describe_sets(result: BenchResult) -> list[str]:
    lines = []
    for name, summary in result.sets.items():
        figures = "; ".join(
            f"{figure} {summary.mean_absolute_percent[figure]:.2f} % off on average, "
            f"{summary.worst_under_percent[figure]:.2f} % at worst too low"
            for figure in summary.mean_absolute_percent
        )
        lines.append(f"{_SET_NAMES[name]} ({count_nouns(summary.num_rows, 'row')}): {figures}")
    return lines


# Against an earlier result

_NO_COMPARISON = "No row has the name of a row in the earlier result."

_COMPARISON_HEADER = ("new / old", "tok/s", "step", "reserved", "on device")


def _draw_comparisons(comparisons: Sequence[RowComparison]) -> RenderableType:
    if not comparisons:
        return Text(f"\n{_NO_COMPARISON}", "yellow")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    for name in _COMPARISON_HEADER:
        table.add_column(name, justify="left" if name == _COMPARISON_HEADER[0] else "right")
    for row in comparisons:
        table.add_row(*map(Text, _comparison_cells(row)))
    return Group(Text(), table)


def _comparison_cells(row: RowComparison) -> list[str]:
    ratios = (row.tok_per_s, row.step_s, row.reserved_bytes, row.device_bytes)
    return [row.name, *(f"{ratio:.3f}" if ratio is not None else _NOTHING for ratio in ratios)]


# Markdown


def _markdown_cells(row: RowResult) -> list[str]:
    plan = _describe_plan(row.plan) if row.plan is not None else _NOTHING
    if row.speed is None:
        return [row.name, plan, str(row.reason), *[_NOTHING] * 8]
    step = row.speed.step_s
    return [
        row.name,
        plan,
        format_count(row.speed.tok_per_s),
        format_count(row.speed.padded_tok_per_s),
        format_count(row.speed.target_tok_per_s),
        f"{step.median:.3f} s ({step.min:.3f} to {step.max:.3f})",
        format_duration(row.epoch_s) if row.epoch_s is not None else _NOTHING,
        *(_markdown_memory(row, figure) for figure in ("reserved", "device")),
        f"{row.ceiling_share * 100:.0f} %" if row.ceiling_share is not None else _NOTHING,
        _speedup_cell(row),
    ]


def _markdown_memory(row: RowResult, figure: str) -> str:
    predicted, measured = (getattr(part, f"{figure}_bytes", None) for part in (row.predicted, row.measured))
    if measured is None:
        return _NOTHING
    if predicted is None:
        return f"{_NOTHING} / {measured / GIB:.2f}"
    return f"{predicted / GIB:.2f} / {measured / GIB:.2f}, {row.error_percent[figure]:+.2f} %"


def _markdown_row(cells: Sequence[str]) -> str:
    # A bar would end the cell, a line end the table.
    escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
