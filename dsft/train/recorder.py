"""Collects what a run told: for the screen, for the event log and for the summary."""

import dataclasses
import json
import statistics
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dsft.core.errors import RunInterrupted
from dsft.core.gpu import GpuMemoryReader
from dsft.core.memory.plan import describe_change
from dsft.train.events import (
    CheckpointSaved,
    Event,
    EventSink,
    InterruptRequested,
    PlanChanged,
    PrepareProgress,
    RunEnded,
    StepDone,
    Validated,
)
from dsft.train.reports import StepReport, ValidationReport
from dsft.train.summary import to_plain

if TYPE_CHECKING:
    from dsft.train.recovery import PlanChange

_WINDOW_STEPS = 20


class RunRecorder:
    """Turns the trainer's reports into events and keeps the figures the summary needs.

    Args:
        sink: Where events go.
        event_log: File that each event is appended to as a JSON line.
        num_steps: Optimizer steps of the whole run.
        gpu_memory: Reads the device's memory; None on a CPU or without NVML.
    """

    def __init__(self, sink: EventSink, event_log: Path, num_steps: int, gpu_memory: GpuMemoryReader | None) -> None:
        self._sink = sink
        self._log = event_log.open("a", encoding="utf-8")
        self._num_steps = num_steps
        self._gpu_memory = gpu_memory
        self._recent: deque[StepReport] = deque(maxlen=_WINDOW_STEPS)
        self.steps: list[StepReport] = []
        self.history: list[dict[str, object]] = []
        self.peak_device_bytes: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_stopped = isinstance(error, RunInterrupted) or not isinstance(error, Exception)
        outcome = "finished" if error is None else "stopped" if is_stopped else "failed"
        with suppress(OSError), self._log:  # the error that ends the run is the one to be told
            self._write(RunEnded(outcome))

    def tell(self, event: Event) -> None:
        """Pass an event on, and append it to the log."""
        self._sink(event)
        if isinstance(event, PrepareProgress):
            return
        record = self._write(event)
        if isinstance(event, CheckpointSaved | Validated | InterruptRequested | PlanChanged):
            self.history.append(record)

    def _write(self, event: Event | RunEnded) -> dict[str, object]:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"event": type(event).__name__, "time": time} | dataclasses.asdict(event)
        self._log.write(json.dumps(to_plain(record), allow_nan=False) + "\n")
        self._log.flush()
        return record

    def on_step(self, report: StepReport, *, validates_next: bool = False, saves_next: bool = False) -> None:
        """Record an optimizer step, and what comes before the next one."""
        self.steps.append(report)
        # The first step of a process carries one-off costs; it counts only until there is a second.
        if len(self.steps) == 2:
            self._recent.clear()
        self._recent.append(report)
        seconds = sum(step.duration_s for step in self._recent)
        memory = self._gpu_memory.read() if self._gpu_memory is not None else None
        if memory is not None:
            self.peak_device_bytes = max(self.peak_device_bytes or 0, memory.used_bytes)
        self.tell(
            StepDone(
                step=report.step,
                num_steps=self._num_steps,
                epoch=report.epoch,
                loss=report.loss,
                grad_norm=report.grad_norm,
                learning_rate=report.learning_rate,
                num_tokens=report.num_tokens,
                num_target_tokens=report.num_targets,
                step_s=report.duration_s,
                tok_per_s=sum(step.num_tokens for step in self._recent) / seconds,
                eta_s=(self._num_steps - report.step) * seconds / len(self._recent),
                memory_used_bytes=memory.used_bytes if memory is not None else None,
                memory_total_bytes=memory.total_bytes if memory is not None else None,
                peak_memory_bytes=self.peak_device_bytes,
                validates_next=validates_next,
                saves_next=saves_next,
            )
        )

    def on_validation(self, report: ValidationReport) -> None:
        """Record a validation pass."""
        self.tell(Validated(report.step, report.loss, report.num_targets, report.is_best, report.duration_s))

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Record a checkpoint."""
        self.tell(CheckpointSaved(step, str(path)))

    def on_interrupt(self, signal_name: str) -> None:
        """Record that a signal came."""
        self.tell(InterruptRequested(signal_name))

    def on_plan_change(self, change: "PlanChange", predicted_memory_bytes: int | None = None) -> None:
        """Record that a plan gave way to a smaller one; peaks begin anew, beside the prediction for that."""
        self.peak_device_bytes = None
        self.tell(
            PlanChanged(
                step=change.step,
                plan=dataclasses.asdict(change.plan),
                failed_plan=dataclasses.asdict(change.failed),
                description=describe_change(change.failed, change.plan),
                reason=change.reason,
                predicted_memory_bytes=predicted_memory_bytes,
            )
        )

    def rates(self) -> tuple[float, float, float]:
        """Return real tokens a second, target tokens a second and the median step in seconds, first step left out."""
        steady = self.steps[1:] or self.steps
        if not steady:
            return 0.0, 0.0, 0.0
        seconds = sum(step.duration_s for step in steady)
        return (
            sum(step.num_tokens for step in steady) / seconds,
            sum(step.num_targets for step in steady) / seconds,
            statistics.median(step.duration_s for step in steady),
        )
