"""Draws the state of a run as the live area of a terminal: one pure function, fitted to any width and height."""

import math
from dataclasses import dataclass

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from dsft.cli.views.drawing import clip, count_nouns, draw_bar, draw_sparkline, flow, format_step_time
from dsft.cli.views.progress_lines import describe_batch, describe_plan, interrupt_message
from dsft.cli.views.progress_state import PhaseSpan, ProgressState, measure_trend
from dsft.core.units import GIB, format_count, format_duration
from dsft.train.events import RunStarted, StepDone, Validated

_MAX_WIDTH = 96
_MIN_FRAME_WIDTH = 64
_SPARE_COLUMNS = 3
"""Left free at the right edge: the terminal echoes ^C at the cursor, which stands behind the last line, and a line
that wraps would leave a part of the live area on the screen."""

_LABEL_WIDTH = 12
_NARROW = 56
"""Below this many columns labels stand close to their values, and those that say little are left out."""

_NARROW_LABELS = {"optimizer": "", "speed": "", "GPU memory": "GPU "}
_SPARK_WIDTH = 40
_MIN_BAR_WIDTH = 4
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_SPINNER_FRAMES_PER_S = 4
_ARROWS = {-1: ("↓", "green"), 0: ("→", "dim"), 1: ("↑", "red")}


@dataclass(frozen=True)
class _Line:
    """One row of the live area; rows of low rank leave first where the terminal is too low."""

    text: Text
    rank: int


def render_progress(state: ProgressState, width: int, height: int, now_s: float) -> RenderableType:
    """Draw the live area.

    Args:
        state: What is known of the run.
        width: Columns of the terminal.
        height: Rows of the terminal; the area stays below that.
        now_s: The time on the state's clock, for spinner, elapsed time and the countdown.
    """
    room = max(8, min(width - _SPARE_COLUMNS, _MAX_WIDTH))
    if state.run is None:
        return _stack(_fit(_phase_lines(state, room, now_s), height - 1))
    frame_room = room - 6
    if room >= _MIN_FRAME_WIDTH:
        lines = _run_lines(state, state.run, frame_room, now_s)
        if len(lines) + 2 < height:
            title = Text.assemble(("dsft train", "not dim bold cyan"), (f" · {state.run.run_name}", "dim"))
            title.truncate(frame_room, overflow="ellipsis")
            return Panel(_stack(lines), box=ROUNDED, title=title, title_align="left", border_style="dim",
                         padding=(0, 2), width=room)  # fmt: skip
    return _stack(_fit(_run_lines(state, state.run, room, now_s), height - 1))


# Before the first step


def _phase_lines(state: ProgressState, width: int, now_s: float) -> list[_Line]:
    return [_Line(_phase_text(phase, state, width, now_s), rank) for rank, phase in enumerate(state.phases)]


def _phase_text(phase: PhaseSpan, state: ProgressState, width: int, now_s: float) -> Text:
    if phase.ended_s is not None:
        mark, style, end_s = "✓", "green", phase.ended_s
    elif state.is_over:
        mark, style, end_s = "✗", "red", state.ended_s
    else:
        mark, style, end_s = _spin(now_s), "cyan", now_s
    details = [format_duration(end_s - phase.started_s)]
    if phase.num_rows is not None:
        details.append(f"{count_nouns(phase.num_rows, 'row')} tokenized")
    return clip(Text.assemble((mark, style), " ", phase.name, ("  " + " · ".join(details), "dim")), width)


# While it trains


def _run_lines(state: ProgressState, run: RunStarted, width: int, now_s: float) -> list[_Line]:
    blank = _Line(Text(), 0)
    lines = [_Line(text, 1) for text in _header(run, width)]
    lines += [blank, _Line(_step_bar(state, run, width), 9)]
    lines += [_Line(text, 8) for text in flow(_times(state, run, now_s), width)]
    figures = _figure_lines(state, state.step, width) if state.step is not None else []
    activity = _activity(state, width, now_s)
    lines += [blank, *figures] if figures else []
    lines += [blank, *activity] if activity else []
    return lines


def _header(run: RunStarted, width: int) -> list[Text]:
    share = run.num_trainable_parameters / max(run.num_parameters, 1)
    trainable = f"trains {_short_count(run.num_trainable_parameters)} of {_short_count(run.num_parameters)} weights"
    return [
        clip(Text(run.model_name, "bold"), width),
        *flow([run.device, run.precision, run.attention], width, "dim"),
        *flow(
            [
                f"batch {describe_batch(run, times='×')}",
                *describe_plan(run),
                run.optimizer,
                count_nouns(run.num_train_samples, "sample"),
                f"{trainable} ({share * 100:.1f} %)",
            ],
            width,
            "dim",
        ),
    ]


def _step_bar(state: ProgressState, run: RunStarted, width: int) -> Text:
    step = state.step.step if state.step is not None else run.first_step
    fraction = step / max(run.num_steps, 1)
    # Cut, not rounded: 100 % is the last step alone.
    figures = f"  {math.floor(fraction * 100):3d} %  {step}/{run.num_steps}"
    style = "green" if step >= run.num_steps else "cyan"
    room = width - len(figures)
    if room < _MIN_BAR_WIDTH:
        return clip(Text(figures.strip(), "bold"), width)
    return Text.assemble(draw_bar(fraction, room, style), (figures, "bold"))


def _times(state: ProgressState, run: RunStarted, now_s: float) -> list[str]:
    epoch = f"epoch {state.step.epoch if state.step is not None else 0:.2f} of {run.num_epochs:.3g}"
    times = [epoch, f"{format_duration(state.elapsed_s(now_s))} elapsed"]
    eta_s = state.eta_s(now_s)
    if eta_s is not None and not state.is_over:
        times.append(f"{format_duration(eta_s)} left")
    return times


def _figure_lines(state: ProgressState, step: StepDone, width: int) -> list[_Line]:
    rates = f"lr {step.learning_rate:.2e} · grad norm {step.grad_norm:.3g}"
    speed = f"{format_count(step.tok_per_s)} tok/s · {format_step_time(step.step_s)} a step"
    lines = [_Line(_loss(state, step, width), 7)]
    if state.validation is not None:
        lines.append(_Line(_validation(state.validation, state.best, width), 6))
    lines.append(_Line(Text.assemble(_label("optimizer", width), rates), 3))
    lines.append(_Line(Text.assemble(_label("speed", width), speed), 5))
    if step.memory_used_bytes is not None and step.memory_total_bytes:
        lines.append(_Line(_memory(step.memory_used_bytes, step.memory_total_bytes, width), 4))
    if state.checkpoint is not None:
        saved = f"step {state.checkpoint.step} · {state.checkpoint.path}"
        lines.append(_Line(Text.assemble(_label("checkpoint", width), saved), 2))
    return [_Line(clip(line.text, width), line.rank) for line in lines]


def _loss(state: ProgressState, step: StepDone, width: int) -> Text:
    text = Text.assemble(_label("loss", width), (f"{step.loss:.4f}", "bold"))
    trend = measure_trend(state.losses)
    if trend is None:
        return text
    arrow, style = _ARROWS[trend.direction]
    text.append(f" {arrow} ", style)
    mean = f"  mean of {trend.num_steps}: {trend.mean:.4f}"
    room = width - len(text)
    if trend.num_steps < 2 or room < len(mean) + 10:
        mean = ""
    num_sparks = max(1, min(_SPARK_WIDTH, room - len(mean)))
    return text.append(draw_sparkline(state.losses[-num_sparks:]), "cyan").append(mean, "dim")


def _validation(newest: Validated, best: Validated | None, width: int) -> Text:
    text = Text.assemble(_label("validation", width), (f"{newest.loss:.4f}", "bold"))
    if newest.is_best and newest.step > 0:
        text.append(" ★ best", "yellow")
    text.append(f" · step {newest.step}", "dim")
    if best is not None and not newest.is_best:
        text.append(f" · best {best.loss:.4f} at step {best.step}", "dim")
    return text


def _memory(used_bytes: int, total_bytes: int, width: int) -> Text:
    fraction = used_bytes / total_bytes
    style = "green" if fraction < 0.8 else "yellow" if fraction < 0.93 else "red"
    figures = f"  {used_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB"
    label = _label("GPU memory", width)
    room = min(_SPARK_WIDTH, max(_MIN_BAR_WIDTH, width - len(label[0]) - len(figures)))
    return Text.assemble(label, draw_bar(fraction, room, style), figures)


def _activity(state: ProgressState, width: int, now_s: float) -> list[_Line]:
    phase = state.current_phase
    if phase is not None:
        texts = [_Line(_phase_text(phase, state, width, now_s), 8)]
    elif state.step is None and not state.is_over:
        waiting = PhaseSpan("first step", state.run_started_s)
        texts = [_Line(_phase_text(waiting, state, width, now_s), 8)]
    else:
        texts = []
    return texts + _interrupt_lines(state, width)


def _interrupt_lines(state: ProgressState, width: int) -> list[_Line]:
    if state.interrupt is None or state.is_over:
        return []
    words = interrupt_message(state.interrupt.signal_name).split(" ")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_Line(Text(line, "bold yellow"), 10) for line in lines]


# Pieces


def _label(name: str, width: int) -> tuple[str, str]:
    label = f"{name:<{_LABEL_WIDTH}}" if width >= _NARROW else _NARROW_LABELS.get(name, f"{name} ")
    return label, "dim"


def _spin(now_s: float) -> str:
    return _SPINNER[int(now_s * _SPINNER_FRAMES_PER_S) % len(_SPINNER)]


def _short_count(count: int) -> str:
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _fit(lines: list[_Line], height: int) -> list[_Line]:
    while len(lines) > max(1, height):
        lowest = min(line.rank for line in lines)
        position = max(index for index, line in enumerate(lines) if line.rank == lowest)
        lines = lines[:position] + lines[position + 1 :]
    return lines


def _stack(lines: list[_Line]) -> Group:
    return Group(*(_no_wrap(line.text) for line in lines))


def _no_wrap(text: Text) -> Text:
    text.no_wrap = True
    return text
