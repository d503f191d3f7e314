"""The monitor's screen as a whole: of each part the fullest form that lets all have a place, at any size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from rich.console import RenderableType

from dsft.cli.views.monitor.edges import ALERT_RANK, draw_alerts, draw_footer, draw_help, draw_unknown_alerts
from dsft.cli.views.monitor.gpu import CHARTS_WIDTH, draw_dense_gpu, draw_gpu, draw_gpu_with_charts, draw_problem
from dsft.cli.views.monitor.gpu_facts import describe_driver
from dsft.cli.views.monitor.gpu_rows import GPU_ROW_RANK, add_num_hidden, draw_gpu_rows
from dsft.cli.views.monitor.host import draw_brief_host, draw_host
from dsft.cli.views.monitor.line import Line, Rows, draw_heading
from dsft.cli.views.monitor.processes import draw_no_processes, draw_process_heading, draw_process_table
from dsft.cli.views.monitor.runs import draw_ended_runs, draw_runs
from dsft.cli.views.monitor.state import MonitorState, list_processes
from dsft.monitor.sample import GpuSample, Sample

_MIN_BLOCK_WIDTH, _BLOCK_GAP = 76, 3
"""Of GPUs that stand side by side."""

_EMPTY_HEADING_RANK = 30
_SPARE_ROWS, _MAX_MORE_ROWS = 4, 10
"""Rows that are left to processes that may come, and by how many the rest of the room makes charts higher at most."""


class GpuForm(IntEnum):
    """How much is told of each GPU."""

    CHARTS = 0
    ROWS = 1
    DENSE = 2
    TABLE = 3


_LEAST_ROWS = {GpuForm.CHARTS: 8, GpuForm.ROWS: 8, GpuForm.DENSE: 4, GpuForm.TABLE: 1}
"""Of a GPU that can be read."""


@dataclass(frozen=True)
class _Plan:
    """In which form the parts are drawn.

    Attributes:
        gpus: The GPUs' form.
        has_full_runs: Whether runs have several rows.
        has_full_host: Whether the host has bars.
        num_processes: For how many processes there has to be room, if there are so many.
    """

    gpus: GpuForm
    has_full_runs: bool
    has_full_host: bool
    num_processes: int


_PLANS = (
    _Plan(GpuForm.CHARTS, True, True, 5),
    _Plan(GpuForm.ROWS, True, True, 3),
    _Plan(GpuForm.DENSE, True, True, 3),
    _Plan(GpuForm.DENSE, True, False, 2),
    _Plan(GpuForm.DENSE, False, False, 1),
    _Plan(GpuForm.TABLE, True, True, 4),
    _Plan(GpuForm.TABLE, False, False, 1),
)
"""The fullest first."""


@dataclass(frozen=True)
class Frame:
    """A drawn screen.

    Attributes:
        lines: Its rows, as many as the terminal has or fewer.
        num_processes: How many processes there are.
        num_shown: For how many of them there is room.
    """

    lines: Sequence[Line]
    num_processes: int = 0
    num_shown: int = 0


def draw_screen(state: MonitorState, width: int, height: int) -> Frame:
    """Draw the screen.

    Args:
        state: What is shown.
        width: Columns of the terminal.
        height: Rows of the terminal.
    """
    sample = state.sample
    footer = draw_footer(state, width)
    if sample is None or state.shows_help:
        lines = _fit(draw_help(width), height - 1)
        return Frame([*lines, *[Line()] * (height - 1 - len(lines)), footer])
    parts = _Parts(state, sample, width)
    for plan in _PLANS:
        frame = _draw_plan(parts, plan, height - 1)
        if frame is not None:
            return Frame([*frame.lines, footer], frame.num_processes, frame.num_shown)
    frame = _squeeze(parts, height - 1)
    return Frame([*frame.lines, footer], frame.num_processes, frame.num_shown)


def render_sample(sample: Sample, width: int, host_name: str = "") -> RenderableType:
    """Draw a sample by itself, as high as it gets: without histories, keys and time."""
    state = MonitorState(interval_s=1.0, has_keys=False, host_name=host_name)
    state.take(sample)
    parts = _Parts(state, sample, width, has_histories=False)
    num_processes = len(parts.processes)
    plan = _Plan(GpuForm.ROWS, True, True, num_processes)
    return Rows([*parts.above(plan), *parts.draw_processes(num_processes), *parts.below(plan)])


class _Parts:
    """The parts of a screen in all their forms, each drawn at most once."""

    def __init__(self, state: MonitorState, sample: Sample, width: int, *, has_histories: bool = True) -> None:
        self.state = state
        self._has_histories = has_histories
        self.sample = sample
        self.width = width
        # An alert that begins while the figures stand still is told all the same.
        self.alerts = (state.newest or sample).alerts
        self.processes = list_processes(sample, state.order)
        self._drawn: dict[object, list[Line]] = {}

    def above(self, plan: _Plan, num_more_rows: int = 0) -> list[Line]:
        """Return what stands above the processes: alerts, GPUs (charts by some rows higher), runs."""
        alerts = self._once("alerts", lambda: draw_alerts(self.alerts, self.width))
        unknown = self._once("unknown", lambda: draw_unknown_alerts(self.state.unknown_alerts, self.width))
        return [
            *alerts,
            *unknown,
            *self._draw_gpus(plan.gpus, num_more_rows),
            *self._draw_runs(is_full=plan.has_full_runs),
        ]

    def ended_runs(self, room: int) -> list[Line]:
        """Return so many rows of runs that have ended at most."""
        return self._once("ended runs", lambda: draw_ended_runs(self.sample.runs, self.width))[: max(0, room)]

    def below(self, plan: _Plan) -> list[Line]:
        """Return what stands below the processes: the host."""
        host = self.sample.host
        if host is None:
            return []
        if not plan.has_full_host:
            return self._once(draw_brief_host, lambda: draw_brief_host(host, self.width, self.state.host_name))
        about = [self.state.host_name] if self.state.host_name else []
        if plan.gpus is GpuForm.TABLE:  # which has no headings to tell it in
            about += [driver.plain] if (driver := describe_driver(self.sample.driver)).width else []
        return self._once((draw_host, plan.gpus is GpuForm.TABLE), lambda: draw_host(host, self.width, about))

    def num_process_rows(self, num_shown: int) -> int:
        """Return how many rows the table of so many processes takes."""
        if not self.sample.gpus:
            return 0
        return 2 + (num_shown if self.processes else 0)

    def draw_processes(self, num_shown: int, scroll: int = 0) -> list[Line]:
        """Draw the table of processes."""
        if not self.sample.gpus:
            return []
        heading = draw_process_heading(len(self.processes), num_shown, scroll, self.state.order, self.width)
        if not self.processes:
            return [heading, draw_no_processes(self.sample, self.width)]
        return [heading, *draw_process_table(self.processes, self.sample.runs, self.width, scroll, num_shown)]

    def least_gpu_rows(self, form: GpuForm) -> int:
        """Return a number of rows that the GPUs take at least, without drawing them."""
        num_usable = sum(gpu.problem is None for gpu in self.sample.gpus)
        num_columns = self._num_columns(form)
        return -(-num_usable // num_columns) * _LEAST_ROWS[form]

    def _num_columns(self, form: GpuForm) -> int:
        if form not in {GpuForm.ROWS, GpuForm.DENSE}:
            return 1
        return max(1, min(len(self.sample.gpus), (self.width + _BLOCK_GAP) // (_MIN_BLOCK_WIDTH + _BLOCK_GAP)))

    def _draw_gpus(self, form: GpuForm, num_more_rows: int) -> list[Line]:
        problem, gpus = self.sample.problem, self.sample.gpus
        if not gpus:
            driver = describe_driver(self.sample.driver)
            heading = draw_heading(Line("GPUs", "bold cyan"), self.width, driver, rank=_EMPTY_HEADING_RANK)
            return [heading, *(draw_problem(problem, self.width) if problem is not None else [])]
        if form is GpuForm.TABLE:
            return self._once(form, lambda: draw_gpu_rows(gpus, self.width))
        num_columns = self._num_columns(form)
        width = (self.width - _BLOCK_GAP * (num_columns - 1)) // num_columns
        key = (form, num_more_rows)
        return self._once(key, lambda: _place(self._draw_blocks(form, width, num_more_rows), num_columns, width))

    def _draw_blocks(self, form: GpuForm, width: int, num_more_rows: int) -> list[list[Line]]:
        def draw(gpu: GpuSample) -> list[Line]:
            history = self.state.history(gpu)
            driver = self.sample.driver if gpu is self.sample.gpus[0] else None
            if form is GpuForm.CHARTS:
                return draw_gpu_with_charts(gpu, history, self.state.interval_s, width, num_more_rows, driver)
            if form is GpuForm.DENSE:
                return draw_dense_gpu(gpu, history, width, driver)
            return draw_gpu(gpu, history if self._has_histories else None, width, driver)

        return [draw(gpu) for gpu in self.sample.gpus]

    def _draw_runs(self, *, is_full: bool) -> list[Line]:
        return self._once(("runs", is_full), lambda: draw_runs(self.sample.runs, self.width, is_full=is_full))

    def _once(self, key: object, draw: Callable[[], list[Line]]) -> list[Line]:
        if key not in self._drawn:
            self._drawn[key] = draw()
        return self._drawn[key]


def _draw_plan(parts: _Parts, plan: _Plan, height: int) -> Frame | None:
    """Draw the parts in certain forms; None if they need more rows than there are."""
    if plan.gpus is GpuForm.CHARTS and parts.width < CHARTS_WIDTH:
        return None
    if parts.least_gpu_rows(plan.gpus) > height:
        return None
    above, below = parts.above(plan), parts.below(plan)
    num_processes = len(parts.processes)
    room = height - len(above) - len(below) - parts.num_process_rows(0)
    if room < min(num_processes, plan.num_processes):
        return None
    ended = parts.ended_runs(room - num_processes)
    room -= len(ended)
    num_more_rows = (room - num_processes - _SPARE_ROWS) // max(1, len(parts.sample.gpus))
    if plan.gpus is GpuForm.CHARTS and num_more_rows > 0:
        above = parts.above(plan, min(num_more_rows, _MAX_MORE_ROWS))
        room = height - len(above) - len(ended) - len(below) - parts.num_process_rows(0)
    scroll = min(parts.state.scroll, max(0, num_processes - room))
    table = parts.draw_processes(min(room, num_processes), scroll)
    blank = [Line()] * (height - len(above) - len(ended) - len(table) - len(below))
    return Frame([*above, *ended, *table, *blank, *below], num_processes, room)


def _squeeze(parts: _Parts, height: int) -> Frame:
    """Draw what matters most where not even the shortest forms have room."""
    plan = _PLANS[-1]
    num_processes = len(parts.processes)
    scroll = min(parts.state.scroll, max(0, num_processes - 1))
    table = parts.draw_processes(min(1, num_processes), scroll)
    above = [line for line in parts.above(plan) if line.rank < ALERT_RANK - 1]
    lines = [*draw_alerts(parts.alerts, parts.width, most=1), *above, *table, *parts.below(plan)]
    kept = _tell_hidden_gpus(_fit(lines, height), parts.sample.gpus, parts.width)
    is_shown = num_processes > 0 and any(line is table[-1] for line in kept)
    return Frame([*kept, *[Line()] * (height - len(kept))], num_processes, int(is_shown))


def _tell_hidden_gpus(lines: list[Line], gpus: Sequence[GpuSample], width: int) -> list[Line]:
    """Have the last GPU that there is room for say how many there is none for."""
    places = [place for place, line in enumerate(lines) if line.rank == GPU_ROW_RANK]
    num_hidden = len(gpus) - len(places)
    if not places or not num_hidden:
        return lines
    last = places[-1]
    return [*lines[:last], add_num_hidden(lines[last], gpus[len(places) - 1], num_hidden, width), *lines[last + 1 :]]


def _place(blocks: list[list[Line]], num_columns: int, width: int) -> list[Line]:
    """Set blocks side by side, row after row."""
    if num_columns == 1:
        return [line for block in blocks for line in block]
    rows = []
    for first in range(0, len(blocks), num_columns):
        beside = blocks[first : first + num_columns]
        for position in range(max(map(len, beside))):
            lines = [block[position] if position < len(block) else Line() for block in beside]
            row = Line(rank=max(line.rank for line in lines))
            for column, line in enumerate(lines):
                row.fill(column * (width + _BLOCK_GAP)).join(line)
            rows.append(row)
    return rows


def _fit(lines: list[Line], height: int) -> list[Line]:
    """Leave out the rows of the lowest rank until the rest fits; of equal ones the lowest on the screen."""
    while len(lines) > max(0, height):
        lowest = min(line.rank for line in lines)
        position = max(index for index, line in enumerate(lines) if line.rank == lowest)
        lines = lines[:position] + lines[position + 1 :]
    return lines
