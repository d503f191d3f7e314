"""Tells a run in plain lines for files, pipes and simple terminals; their words are stable, for grep."""

from dsft.cli.views.drawing import count_nouns
from dsft.core.units import GIB, format_count, format_duration, format_gib
from dsft.train.events import (
    CheckpointSaved,
    Event,
    InterruptRequested,
    Notice,
    Phase,
    PlanChanged,
    PrepareProgress,
    RunStarted,
    StepDone,
    Validated,
)

STEP_INTERVAL_S = 1.0
ROWS_INTERVAL_S = 10.0


class LineChooser:
    """Chooses what of a run becomes a line: everything but steps and row counts that follow too fast.

    Every step is a line where steps are slow; of fast ones about one a second, and always the first and the last.
    """

    def __init__(self) -> None:
        self._last_step_s: float | None = None
        self._last_rows_s = 0.0
        self._left_out: StepDone | None = None

    def choose(self, event: Event, now_s: float) -> list[str]:
        """Return the lines for an event that came at `now_s` (seconds on any monotonic clock)."""
        match event:
            case StepDone():
                return self._choose_step(event, now_s)
            case PrepareProgress():
                if now_s - self._last_rows_s < ROWS_INTERVAL_S:
                    return []
                self._last_rows_s = now_s
            case Phase():
                self._last_rows_s = now_s
        return [format_event(event)]

    def finish(self) -> list[str]:
        """Return the line of the last step, if it was left out."""
        left_out, self._left_out = self._left_out, None
        return [] if left_out is None else [format_event(left_out)]

    def _choose_step(self, event: StepDone, now_s: float) -> list[str]:
        is_due = self._last_step_s is None or now_s - self._last_step_s >= STEP_INTERVAL_S
        if not is_due and event.step < event.num_steps:
            self._left_out = event
            return []
        self._last_step_s = now_s
        self._left_out = None
        return [format_event(event)]


def format_event(event: Event) -> str:
    """Return an event as one line of ASCII words; names and paths are as the user gave them."""
    match event:
        case Notice(text, level):
            return f"{'warning' if level == 'warning' else 'note'}: {text}"
        case Phase(name):
            return f"{name} ..."
        case PrepareProgress(num_rows):
            return f"{count_nouns(num_rows, 'row')} tokenized"
        case RunStarted():
            return _format_start(event)
        case StepDone():
            return _format_step(event)
        case Validated():
            best = "  best" if event.is_best and event.step > 0 else ""
            duration = format_duration(event.duration_s)
            return f"validation at step {event.step}  loss {event.loss:.4f}{best}  took {duration}"
        case CheckpointSaved(step, path):
            return f"checkpoint at step {step}  {path}"
        case InterruptRequested(signal_name):
            return interrupt_message(signal_name)
        case PlanChanged():
            return plan_change_message(event)


def plan_change_message(change: PlanChanged) -> str:
    """Return the sentence that tells of a smaller plan."""
    where = f"step {change.step}" if change.step else "the rehearsal of the largest micro-batch"
    return f"warning: GPU memory ran out in {where}; it is done again with {change.description}"


def interrupt_message(signal_name: str) -> str:
    """Return the sentence that answers a first signal."""
    again = "press Ctrl-C again" if signal_name == "SIGINT" else f"send {signal_name} again"
    return f"{signal_name}: finishing this step and saving; {again} to stop at once"


def _format_start(run: RunStarted) -> str:
    start = f", from step {run.first_step}" if run.first_step else ""
    return (
        f"training {run.model_name} on {run.device}: {count_nouns(run.num_steps, 'step')}{start}, "
        f"effective batch {describe_batch(run)}, {run.precision}, {run.attention}, {run.optimizer}"
        + "".join(f", {part}" for part in describe_plan(run))
    )


def describe_batch(run: RunStarted, times: str = "x") -> str:
    """Return how the effective batch is split."""
    if run.micro_batch_tokens is not None:
        return f"{run.effective_batch_size} in passes of up to {format_count(run.micro_batch_tokens)} tokens"
    accumulation = -(-run.effective_batch_size // run.micro_batch_size)
    return f"{run.effective_batch_size} = {run.micro_batch_size} {times} {accumulation}"


def describe_plan(run: RunStarted) -> list[str]:
    """Return what else the plan says: recomputation and predicted memory."""
    parts = []
    if run.num_recomputed_blocks:
        parts.append(f"{run.num_recomputed_blocks} of {run.num_blocks} blocks recompute")
    if run.predicted_memory_bytes is not None:
        parts.append(f"{format_gib(run.predicted_memory_bytes)} predicted")
    return parts


def _format_step(step: StepDone) -> str:
    parts = [
        f"step {step.step}/{step.num_steps}",
        f"loss {step.loss:.4f}",
        f"lr {step.learning_rate:.1e}",
        f"tok/s {step.tok_per_s:.0f}",
        f"eta {format_duration(step.eta_s)}",
    ]
    if step.memory_used_bytes is not None and step.memory_total_bytes:
        parts.append(f"gpu {step.memory_used_bytes / GIB:.1f}/{step.memory_total_bytes / GIB:.1f} GiB")
    return "  ".join(parts)
