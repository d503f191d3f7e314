"""Training runs on the monitor's screen: how far they are, where the loss goes, and memory against its prediction."""

import math
from collections.abc import Sequence

from rich.cells import cell_len

from dsft.cli.views.drawing import draw_sparkline
from dsft.cli.views.monitor.line import Line, clip_text, draw_heading, flow_lines, join_fitting, labelled, printable
from dsft.cli.views.monitor.run_words import (
    describe_outcome,
    describe_silence,
    describe_stage,
    format_end_time,
    name_runs,
)
from dsft.core.units import GIB, format_count, format_duration
from dsft.monitor.sample import RunSample

_ARROWS = {-1: ("↓", "green"), 0: ("→", "dim"), 1: ("↑", "red")}
_STAGE_STYLES = {"training": "green", "stopping": "bold yellow"}
_OUTCOME_STYLES = {"finished": "green", "stopped": "yellow", "failed": "red", "killed": "red"}
_OVERDUE_STYLE = "bold yellow"
_MIN_BAR_WIDTH, _MAX_BRIEF_BAR_WIDTH = 4, 40
_TIME_WIDTH = len("59 min 59 s left")
"""So that a bar does not change its length with the words for the time left."""

_MIN_SPARK_WIDTH, _MAX_SPARK_WIDTH = 16, 64
_LEAST_NAME_WIDTH, _MIN_NAME_WIDTH, _MAX_NAME_WIDTH = 6, 8, 28
_HEADING_EDGES = 10
"""Columns that a heading has beside its title and note."""

_HEADING_RANK, _STEP_RANK, _FIGURES_RANK, _MORE_RANK, _ENDED_RANK = 56, 77, 54, 41, 20


def draw_runs(runs: Sequence[RunSample], width: int, *, is_full: bool) -> list[Line]:
    """Draw the runs that go on.

    Args:
        runs: All runs.
        width: Columns there are.
        is_full: Whether each has a heading, its step and its figures, or all in one row.
    """
    draw = _draw_run if is_full else _draw_brief_run
    named = zip(runs, name_runs(runs), strict=True)
    return [row for run, name in named if run.outcome is None for row in draw(run, name, width)]


def draw_ended_runs(runs: Sequence[RunSample], width: int) -> list[Line]:
    """Draw a row for each run that has ended.

    Args:
        runs: All runs.
        width: Columns there are.
    """
    named = zip(runs, name_runs(runs), strict=True)
    return [_draw_ended_run(run, name, width) for run, name in named if run.outcome is not None]


def _draw_run(run: RunSample, name: tuple[str, str], width: int) -> list[Line]:
    heading, has_device = _draw_heading(run, name, width)
    step = _draw_step(run, width)
    rows = [heading, *([step] if step is not None else [])]
    figures = _list_figures(run)
    mean = _describe_mean(run)
    if mean is not None:
        figures = _choose_figures(run, [mean, *figures], figures, width)
    if run.device and not has_device:
        figures = _choose_figures(run, [*figures, Line(printable(run.device), "dim")], figures, width)
    rows += _flow_figures(run, figures, width)
    for row in rows[2 + (step is not None) :]:
        row.rank = _MORE_RANK
    return rows


def _draw_brief_run(run: RunSample, name: tuple[str, str], width: int) -> list[Line]:
    room = min(_MAX_NAME_WIDTH, max(6, width // 4))
    fields = [(4, _draw_name(name, max(room, width // 3) if name[1] else room, "bold cyan"))]
    if run.is_overdue:
        fields.append((7, Line(describe_silence(run), _OVERDUE_STYLE)))
    elif run.stage != "training" or run.step is None:
        fields.append((5, Line(run.stage, _STAGE_STYLES.get(run.stage, "yellow"))))
    if run.step is not None and run.num_steps:
        fraction = run.step / run.num_steps
        bar_width = max(_MIN_BAR_WIDTH, min(_MAX_BRIEF_BAR_WIDTH, width - 60))
        fields.append((0, Line().add_bar(fraction, bar_width, "cyan")))
        fields.append((3, Line(f"{math.floor(fraction * 100)} %", "bold")))
        fields.append((9, Line(f"{run.step}/{run.num_steps}", "bold")))
    if run.eta_s is not None:
        fields.append((8, Line(f"{format_duration(run.eta_s)} left")))
    if run.loss is not None:
        fields.append((2, _draw_loss(run, 0)))
    return [join_fitting(fields, width, rank=_STEP_RANK)]


def _draw_ended_run(run: RunSample, name: tuple[str, str], width: int) -> Line:
    title = Line("run ", "dim").join(_draw_name(name, max(_MIN_NAME_WIDTH, width // 3), "dim"))
    outcome = Line(describe_outcome(run), _OUTCOME_STYLES.get(run.outcome or "", "dim"))
    fields = [(4, title), (5, outcome), (1, Line(format_end_time(run), "dim"))]
    if run.step is not None:
        fields.append((3, Line(f"step {run.step}{f'/{run.num_steps}' if run.num_steps else ''}", "dim")))
    if run.loss is not None:
        fields.append((2, Line(f"loss {run.loss:.4f}", "dim")))
    return join_fitting(fields, width, gap=" · ", rank=_ENDED_RANK)


def _draw_heading(run: RunSample, name: tuple[str, str], width: int) -> tuple[Line, bool]:
    """Draw the heading; return whether it has the device, too."""
    stage, style = describe_stage(run), _OVERDUE_STYLE if run.is_overdue else _STAGE_STYLES.get(run.stage, "yellow")
    room = width - len("── run  · ")
    if room - cell_len(stage) < _MIN_NAME_WIDTH:
        stage = describe_silence(run) or stage
    name_width = max(_MIN_NAME_WIDTH, min(width // 2, room - cell_len(stage)))
    title = Line("run ", "bold cyan").join(_draw_name(name, name_width, "bold")).add(" · ", "dim").add(stage, style)
    model = clip_text(printable(run.model_name or ""), max(8, width // 3))
    device, pid = printable(run.device or ""), f"PID {run.pid}"
    notes = [" · ".join(part for part in parts if part) for parts in ((model, device, pid), (model, pid), (pid,))]
    fitting = [note for note in notes if title.width + cell_len(note) + _HEADING_EDGES <= width]
    note = fitting[0] if fitting else pid
    return draw_heading(title, width, Line(note, "dim"), rank=_HEADING_RANK), bool(device) and note == notes[0]


def _draw_name(name: tuple[str, str], width: int, style: str) -> Line:
    """Draw a run's name and the folder that tells it from its namesakes, which is worth more room than the name."""
    text, folder = name
    if not folder:
        return Line(clip_text(text, width), style)
    folder = _clip_folder(folder, max(1, width - _LEAST_NAME_WIDTH - 3))
    return Line(clip_text(text, max(1, width - cell_len(folder) - 3)), style).add(f" ({folder})", "dim")


def _clip_folder(folder: str, width: int) -> str:
    if "/" in folder:  # what follows the first part is the same in all
        return clip_text(folder, width)
    end = folder
    while cell_len(end) > width:  # names that are made after each other differ at their ends
        end = end[1:]
    return end if end == folder else f"…{end[1:]}"


def _draw_step(run: RunSample, width: int) -> Line | None:
    if run.step is None or not run.num_steps:
        return None
    fraction = run.step / run.num_steps
    time_left = f"{format_duration(run.eta_s)} left" if run.eta_s is not None else ""
    # Cut, not rounded: 100 % is the last step alone.
    figures = Line(f"{math.floor(fraction * 100):3d} %  {run.step:>{len(str(run.num_steps))}}/{run.num_steps}", "bold")
    figures.add(f"  {time_left:>{_TIME_WIDTH}}")
    bar_width = width - figures.width - 2
    if bar_width < _MIN_BAR_WIDTH:
        fields = [(1, Line(f"{run.step}/{run.num_steps}", "bold"))]
        if time_left:
            fields.append((0, Line(time_left)))
        return join_fitting(fields, width, rank=_STEP_RANK)
    style = "green" if run.step >= run.num_steps else "cyan"
    return Line(rank=_STEP_RANK).add_bar(fraction, bar_width, style).add("  ").join(figures)


def _choose_figures(run: RunSample, longer: list[Line], figures: list[Line], width: int) -> list[Line]:
    """Return the longer list where that takes no further row."""
    has_room = len(_flow_figures(run, longer, width)) <= len(_flow_figures(run, figures, width))
    return longer if has_room else figures


def _flow_figures(run: RunSample, figures: list[Line], width: int) -> list[Line]:
    loss = [_draw_loss(run, _spark_width(figures, width))] if run.loss is not None else []
    return flow_lines([*loss, *figures], width, rank=_FIGURES_RANK)


def _draw_loss(run: RunSample, spark_width: int) -> Line:
    from dsft.cli.views.progress_state import measure_trend  # only where a run goes on: it imports statistics

    line = labelled("loss", f"{run.loss:.4f}", "bold")
    trend = measure_trend(run.recent_losses)
    if trend is not None:
        arrow, style = _ARROWS[trend.direction]
        line.add(f" {arrow}", style)
        if spark_width > 0:
            line.add(" ").add(draw_sparkline(run.recent_losses[-spark_width:]), "cyan")
    return line


def _spark_width(figures: list[Line], width: int) -> int:
    """Return what the other figures leave in the first row, or half of it."""
    taken = sum(figure.width + 3 for figure in figures)
    room = width - len("loss 1.0000 ↓ ")
    return max(0, min(_MAX_SPARK_WIDTH, room - taken if room - taken >= _MIN_SPARK_WIDTH else room // 3))


def _list_figures(run: RunSample) -> list[Line]:
    figures = []
    if run.tok_per_s is not None:
        figures.append(Line(f"{format_count(run.tok_per_s)} tok/s"))
    memory = _describe_memory(run)
    if memory is not None:
        figures.append(memory)
    if run.epoch is not None:
        of = "" if run.num_epochs is None else f" of {run.num_epochs:.3g}"
        figures.append(labelled("epoch", f"{run.epoch:.2f}{of}"))
    if run.validation_loss is not None:
        validation = labelled("validation", f"{run.validation_loss:.4f}")
        if run.best_validation_loss is not None and run.best_validation_loss < run.validation_loss:
            validation.add(f" (best {run.best_validation_loss:.4f})", "dim")
        figures.append(validation)
    return figures


def _describe_mean(run: RunSample) -> Line | None:
    from dsft.cli.views.progress_state import measure_trend

    trend = measure_trend(run.recent_losses)
    if trend is None or trend.num_steps == 1:
        return None
    return labelled(f"mean of {trend.num_steps}:", f"{trend.mean:.4f}", "dim")


def _describe_memory(run: RunSample) -> Line | None:
    peak, predicted = run.peak_memory_bytes, run.predicted_memory_bytes
    if peak is None:
        return None if predicted is None else Line(f"{predicted / GIB:.1f} GiB predicted")
    if predicted is None:
        return labelled("peak", f"{peak / GIB:.1f} GiB")
    style = "bold yellow" if peak > predicted else ""
    return labelled("peak", f"{peak / GIB:.1f} of {predicted / GIB:.1f} GiB predicted", style)
