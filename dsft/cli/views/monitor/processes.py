"""Processes on the monitor's screen: a table that scrolls, with containers shown as far as they can be seen."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from dsft.cli.views.monitor.figures import MISSING, format_figure, format_size
from dsft.cli.views.monitor.line import Line, clip_text, draw_heading, printable
from dsft.cli.views.monitor.state import SortOrder
from dsft.monitor.sample import ProcessSample, RunSample, Sample

_Row = tuple[str, ProcessSample]
_MIN_PID_WIDTH, _MAX_CONTAINER_WIDTH = 10, 6
_MAX_USER_WIDTH = 12
_MEMORY_WIDTH, _SM_WIDTH = 9, 5
_NARROW = 60
"""Below this many columns there is no room for the user and the share of the multiprocessors."""

_TINY = 34
"""Below this many columns there is none for the GPU either."""

_RUN_MARK = "★"
_HEADING_RANK, _HEADER_RANK, _ROW_RANK = 53, 31, 40


@dataclass(frozen=True)
class _Columns:
    """Widths of the columns that depend on the rows and the terminal; 0 for those left out."""

    gpu: int
    pid: int
    user: int
    sm: int


def draw_process_heading(num_rows: int, num_shown: int, scroll: int, order: SortOrder, width: int) -> Line:
    """Draw the heading of the table: how it is sorted, and what is out of sight.

    Args:
        num_rows: How many processes there are.
        num_shown: How many of them are shown.
        scroll: How many are above the first one shown.
        order: What they are sorted by.
        width: Of the row.
    """
    title = Line("processes", "bold cyan")
    order_words = f" · {order}" if num_rows > 1 else ""
    below = max(0, num_rows - scroll - num_shown)
    long = " · ".join([*([f"{scroll} above"] if scroll else []), *([f"{below} more below"] if below else [])])
    short = " ".join([*([f"-{scroll}"] if scroll else []), *([f"+{below}"] if below else [])])
    # What is out of sight is told at any width; the order, which s shows, gives way to it.
    for note, words in ((long, order_words), (short, order_words), (short, "")):
        heading = draw_heading(
            Line().join(title).add(words, "dim"), width, Line(note, "yellow") if note else None, rank=_HEADING_RANK
        )
        if note in heading.plain and (not words or words in heading.plain):
            return heading
    return Line(short, "yellow", _HEADING_RANK).clip(width) if short else heading


def draw_process_table(
    rows: Sequence[_Row], runs: Sequence[RunSample], width: int, first: int, num_shown: int
) -> list[Line]:
    """Draw the names of the columns and some rows of the table.

    Args:
        rows: All processes with their devices, sorted.
        runs: Training runs; their processes are marked.
        width: Of the rows.
        first: The first row that is drawn.
        num_shown: How many are drawn.
    """
    columns = _lay_out(rows, width)
    names = [f"{name:>{columns_width}}" for name, columns_width in (("GPU", columns.gpu), ("PID", columns.pid))]
    names += [f"{'USER':<{columns.user}}", f"{'MEMORY':>{_MEMORY_WIDTH}}", f"{'SM':>{columns.sm}}"]
    header = _join([Line(name) for name in names], Line("COMMAND"), columns, width)
    header.parts = [(text, "dim") for text, _ in header.parts]
    header.rank = _HEADER_RANK
    run_pids = {run.pid for run in runs if run.outcome is None}
    return [header, *(_draw_row(row, columns, run_pids, width) for row in rows[first : first + num_shown])]


def _lay_out(rows: Sequence[_Row], width: int) -> _Columns:
    is_wide = width >= _NARROW
    pid = max([len("PID"), *(cell_len(_format_pid(process)) for _, process in rows)])
    user = max([len("USER"), *(cell_len(process.user or MISSING) for _, process in rows)])
    gpu = max([len("GPU"), *(len(device) for device, _ in rows)])
    return _Columns(
        gpu=gpu if width >= _TINY else 0,
        pid=min(pid, max(_MIN_PID_WIDTH, width * 3 // 10)),
        user=min(_MAX_USER_WIDTH, user) if is_wide else 0,
        sm=_SM_WIDTH if is_wide else 0,
    )


def _draw_row(row: _Row, columns: _Columns, run_pids: set[int], width: int) -> Line:
    device, process = row
    cells = [
        Line(f"{device:>{columns.gpu}}", "cyan"),
        _align_right(_format_pid(process), columns.pid),
        Line(clip_text(printable(process.user or MISSING), columns.user), "" if process.user else "dim").fill(
            columns.user
        ),
        Line(f"{format_size(process.memory_used_bytes):>{_MEMORY_WIDTH}}", "bold"),
        Line(f"{format_figure(process.sm_utilization_percent, '%'):>{columns.sm}}"),
    ]
    line = _join(cells, _describe_command(process, run_pids), columns, width)
    line.rank = _ROW_RANK
    return line


def _join(cells: list[Line], command: Line, columns: _Columns, width: int) -> Line:
    line = Line()
    for cell, columns_width in zip(
        cells, (columns.gpu, columns.pid, columns.user, _MEMORY_WIDTH, columns.sm), strict=True
    ):
        if columns_width:
            line.join(cell).add("  " if columns.user else " ")
    return line.join(command).clip(width)


def _align_right(text: str, width: int) -> Line:
    text = clip_text(text, width)
    return Line(" " * (width - cell_len(text)) + text)


def _format_pid(process: ProcessSample) -> str:
    """Return the PID as the driver counts, and the one in the process's container where that is another."""
    if process.container_pid is None:
        return str(process.pid)
    place = process.container_id or "a container"
    if len(place) > _MAX_CONTAINER_WIDTH and process.container_id is not None:
        place = f"{place[:_MAX_CONTAINER_WIDTH]}…"
    return f"{process.pid} ({process.container_pid} in {printable(place)})"


def _describe_command(process: ProcessSample, run_pids: set[int]) -> Line:
    line = Line()
    kind = f"{process.kind} " if "graphics" in process.kind else ""  # nearly all only compute
    if not process.is_visible:
        return line.add(f"{kind}not visible from here (another container, or hidden)", "dim")
    # A run's PID counts in its own container, so that only one outside of any is known to be the same process.
    if process.pid in run_pids and process.container_pid is None:
        line.add(f"{_RUN_MARK} ", "bold cyan")
    line.add(kind, "dim")
    return line.add(printable(process.command)) if process.command else line.add(MISSING, "dim")


def draw_no_processes(sample: Sample, width: int) -> Line:
    """Say why the table is empty."""
    usable = [gpu for gpu in sample.gpus if gpu.problem is None]
    told = any(gpu.processes is not None or any(mig.processes is not None for mig in gpu.migs) for gpu in usable)
    words = "no process uses a GPU" if told else f"processes {MISSING}: the driver does not tell them"
    return Line(words, "dim", _ROW_RANK).clip(width)
