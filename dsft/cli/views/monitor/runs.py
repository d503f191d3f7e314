"""Training runs on the monitor's screen: how far they are, where the loss goes, and memory against its prediction."""

import math

from dsft.cli.views.drawing import draw_sparkline
from dsft.cli.views.monitor.line import Line, clip_text, draw_heading, flow_lines, join_fitting, labelled, printable
from dsft.core.units import GIB, format_count, format_duration
from dsft.monitor.sample import RunSample

_ARROWS = {-1: ("↓", "green"), 0: ("→", "dim"), 1: ("↑", "red")}
_STAGE_STYLES = {"training": "green", "stopping": "bold yellow"}
_MIN_BAR_WIDTH, _MAX_BRIEF_BAR_WIDTH = 4, 40
_MAX_SPARK_WIDTH = 64
_MAX_NAME_WIDTH = 28
_SILENT_S, _SILENT_STEPS = 30.0, 5
"""A run that told nothing for so long, and for as long as so many of its steps take, is worth a word."""

_HEADING_RANK, _STEP_RANK, _FIGURES_RANK, _MORE_RANK = 56, 77, 54, 41


def draw_run(run: RunSample, width: int) -> list[Line]:
    """Draw a run in a heading, its step and its figures."""
    name = Line("run ", "bold cyan").add(clip_text(printable(run.run_name), max(8, width // 2)), "bold")
    name.add(" · ", "dim").add(run.stage, _STAGE_STYLES.get(run.stage, "yellow"))
    note = Line(f"PID {run.pid}", "dim")
    if run.model_name:
        note = Line(clip_text(printable(run.model_name), max(8, width // 3)), "dim").add(" · ", "dim").join(note)
    rows = [draw_heading(name, width, note, rank=_HEADING_RANK)]
    step = _draw_step(run, width)
    rows += [step] if step is not None else []
    figures = _list_figures(run)
    if run.loss is not None:
        loss = _draw_loss(run, _spark_width(figures, width))
        figures = [loss, *figures]
    rows += flow_lines(figures, width, rank=_FIGURES_RANK)
    for row in rows[2 + (step is not None) :]:
        row.rank = _MORE_RANK
    return rows


def draw_brief_run(run: RunSample, width: int) -> list[Line]:
    """Draw a run in one row."""
    name = Line(clip_text(printable(run.run_name), min(_MAX_NAME_WIDTH, max(6, width // 4))), "bold cyan")
    fields = [(4, name), (5, Line(run.stage, _STAGE_STYLES.get(run.stage, "yellow")))]
    if run.stage == "training" and run.step is not None:
        fields = fields[:1]
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
    silence = _describe_silence(run)
    if silence is not None:
        fields.append((6, silence))
    return [join_fitting(fields, width, rank=_STEP_RANK)]


def _draw_step(run: RunSample, width: int) -> Line | None:
    if run.step is None or not run.num_steps:
        return None
    fraction = run.step / run.num_steps
    # Cut, not rounded: 100 % is the last step alone.
    figures = Line(f"{math.floor(fraction * 100):3d} %  {run.step}/{run.num_steps}", "bold")
    if run.eta_s is not None:
        figures.add(f"  {format_duration(run.eta_s)} left")
    bar_width = width - figures.width - 2
    if bar_width < _MIN_BAR_WIDTH:
        fields = [(1, Line(f"{run.step}/{run.num_steps}", "bold"))]
        if run.eta_s is not None:
            fields.append((0, Line(f"{format_duration(run.eta_s)} left")))
        return join_fitting(fields, width, rank=_STEP_RANK)
    style = "green" if run.step >= run.num_steps else "cyan"
    return Line(rank=_STEP_RANK).add_bar(fraction, bar_width, style).add("  ").join(figures)


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
    return max(0, min(_MAX_SPARK_WIDTH, room - taken if room - taken >= 16 else room // 3))


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
    silence = _describe_silence(run)
    return figures if silence is None else [silence, *figures]


def _describe_memory(run: RunSample) -> Line | None:
    peak, predicted = run.peak_memory_bytes, run.predicted_memory_bytes
    if peak is None:
        return None if predicted is None else Line(f"{predicted / GIB:.1f} GiB predicted")
    if predicted is None:
        return labelled("peak", f"{peak / GIB:.1f} GiB")
    style = "bold yellow" if peak > predicted else ""
    return labelled("peak", f"{peak / GIB:.1f} of {predicted / GIB:.1f} GiB predicted", style)


def _describe_silence(run: RunSample) -> Line | None:
    age_s = run.last_event_age_s
    if age_s is None or age_s < max(_SILENT_S, _SILENT_STEPS * (run.step_s or 0.0)):
        return None
    # Only steps are expected to come one after the other; loading and saving take their time.
    return Line(f"told nothing for {format_duration(age_s)}", "bold yellow" if run.stage == "training" else "yellow")
