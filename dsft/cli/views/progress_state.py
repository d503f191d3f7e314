"""What the progress display knows of a run: an immutable state and the pure function that moves it. No drawing."""

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

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

NUM_LOSSES_KEPT = 64
"""Enough for the widest sparkline and for both windows of the trend."""

TREND_WINDOW = 10
"""Steps in each of the two windows that the loss trend compares."""

TREND_THRESHOLD = 0.005
"""Relative change below which the loss counts as flat."""


@dataclass(frozen=True)
class PhaseSpan:
    """One phase of the work and when it ran, on the display's clock.

    Attributes:
        name: As the run named it.
        started_s: When it began.
        ended_s: When it ended; None while it runs.
        num_rows: Rows tokenized in it so far, where it tokenizes.
    """

    name: str
    started_s: float
    ended_s: float | None = None
    num_rows: int | None = None


@dataclass(frozen=True)
class Trend:
    """Where the loss goes.

    Attributes:
        direction: -1 falling, 0 flat, 1 rising.
        mean: Mean loss of the last window, nats.
        num_steps: Steps in that window.
    """

    direction: int
    mean: float
    num_steps: int


@dataclass(frozen=True)
class ProgressState:
    """Everything the display shows. Times are seconds on one monotonic clock.

    Attributes:
        phases: Phases so far; at most the last one has no end.
        run: How the run began; None before the first step.
        run_started_s: When it began.
        step: The newest step, and when it was done.
        losses: Newest training losses, oldest first, at most `NUM_LOSSES_KEPT`.
        validation: The newest validation pass.
        best: The best validation pass.
        checkpoint: The newest checkpoint.
        interrupt: The signal that asked for the end.
        is_over: Nothing more will come.
    """

    phases: tuple[PhaseSpan, ...] = ()
    run: RunStarted | None = None
    run_started_s: float = 0.0
    step: StepDone | None = None
    step_done_s: float = 0.0
    losses: tuple[float, ...] = ()
    validation: Validated | None = None
    best: Validated | None = None
    checkpoint: CheckpointSaved | None = None
    interrupt: InterruptRequested | None = None
    is_over: bool = False
    ended_s: float = 0.0

    @property
    def current_phase(self) -> PhaseSpan | None:
        """The phase that is going on, if any."""
        return self.phases[-1] if self.phases and self.phases[-1].ended_s is None else None

    def elapsed_s(self, now_s: float) -> float:
        """Seconds since the first step began."""
        return (self.ended_s if self.is_over else now_s) - self.run_started_s

    def eta_s(self, now_s: float) -> float | None:
        """Seconds left, counted down since the last step said so; None before the first step is done."""
        if self.step is None:
            return None
        return max(0.0, self.step.eta_s - (now_s - self.step_done_s))


def advance(state: ProgressState, event: Event, now_s: float) -> ProgressState:
    """Return the state after an event."""
    match event:
        case Phase(name):
            return replace(state, phases=(*_close_phase(state, now_s), PhaseSpan(name, now_s)))
        case PrepareProgress(num_rows):
            return replace(state, phases=_change_phase(state, num_rows=num_rows))
        case RunStarted():
            return replace(state, phases=_close_phase(state, now_s), run=event, run_started_s=now_s)
        case StepDone():
            losses = (*state.losses, event.loss)[-NUM_LOSSES_KEPT:]
            phases = _close_phase(state, now_s)
            return replace(state, phases=phases, step=event, step_done_s=now_s, losses=losses)
        case Validated():
            best = event if event.is_best else state.best
            return replace(state, phases=_close_phase(state, now_s), validation=event, best=best)
        case CheckpointSaved():
            return replace(state, phases=_close_phase(state, now_s), checkpoint=event)
        case InterruptRequested():
            return replace(state, interrupt=event)
        case Notice() | PlanChanged():
            return state


def finish(state: ProgressState, now_s: float, *, is_failed: bool) -> ProgressState:
    """Return the state after the end of the command, which stops its clocks."""
    # A phase cut short by an error keeps no end, so that the display can mark it.
    phases = state.phases if is_failed else _close_phase(state, now_s)
    return replace(state, phases=phases, is_over=True, ended_s=now_s)


def measure_trend(losses: tuple[float, ...]) -> Trend | None:
    """Compare the mean of the last steps with the mean of as many steps before them.

    Args:
        losses: Training losses, oldest first.

    Returns:
        None while there are fewer than two losses.
    """
    num_steps = min(TREND_WINDOW, len(losses) // 2)
    if num_steps == 0:
        return None
    mean = fmean(losses[-num_steps:])
    before = fmean(losses[-2 * num_steps : -num_steps])
    change = mean - before
    is_flat = abs(change) <= TREND_THRESHOLD * abs(before)
    return Trend(0 if is_flat else -1 if change < 0 else 1, mean, num_steps)


def _close_phase(state: ProgressState, now_s: float) -> tuple[PhaseSpan, ...]:
    return _change_phase(state, ended_s=now_s)


def _change_phase(state: ProgressState, **changes: Any) -> tuple[PhaseSpan, ...]:
    phase = state.current_phase
    return state.phases if phase is None else (*state.phases[:-1], replace(phase, **changes))
