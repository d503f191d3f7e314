"""What a bench found: one record for the screen, for --json and for a later --compare."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dsft.bench.figures import MemoryFigures, Speed
from dsft.bench.rows import SetName
from dsft.core.errors import ExitCode

FORMAT = 1
"""Version of the record; docs/bench.md describes it."""

Status = Literal["done", "does_not_fit", "out_of_memory", "failed"]
"""How a row ended: measured; refused before it ran; out of memory while it ran; any other error."""


@dataclass(frozen=True)
class PlanFigures:
    """The plan a row ran with; see `dsft.core.memory.plan.ExecutionPlan`.

    Attributes:
        micro_batch_size: Sequences of the greatest length in a micro-batch.
        micro_batch_tokens: Most tokens in it.
        splits_by_tokens: Whether micro-batches are filled by tokens.
        num_recomputed: Blocks that recompute.
        num_blocks: Blocks there are.
        pages_optimizer: Whether the optimizer's state can page.
        is_chosen: Whether dsft chose it; else the settings were taken as written.
    """

    micro_batch_size: int
    micro_batch_tokens: int
    splits_by_tokens: bool
    num_recomputed: int
    num_blocks: int
    pages_optimizer: bool
    is_chosen: bool


@dataclass(frozen=True)
class TimeShares:
    """Where the time of a step goes.

    Attributes:
        shares: Kind of work to its share of the step; they add up to 1.
        source: Kernels on a GPU as the profiler saw them, or the wall clock of a CPU.
    """

    shares: dict[str, float]
    source: Literal["kernels", "wall clock"]


@dataclass(frozen=True)
class BaselineResult:
    """The plain path on the same samples.

    Attributes:
        status: How it ended.
        reason: Why it was not measured; None where it was.
        speed: How fast its steps ran.
        measured: Its peak of GPU memory.
        speedup: tok/s of dsft over tok/s of the plain path.
    """

    status: Status
    reason: str | None = None
    speed: Speed | None = None
    measured: MemoryFigures | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class RowResult:
    """What was found about one configuration.

    Attributes:
        name: What rows are compared by.
        set: "fitted" or "held_out", where the grid says so.
        status: How it ended.
        reason: Why it was not measured; None where it was.
        exit_code: What a bench of this row alone ends with.
        config: The configuration.
        data: What was trained on.
        precision: Compute type.
        blocks: What computed the blocks.
        attention: The attention kernel.
        plan: How a step ran.
        speed: How fast steps ran.
        predicted: Predicted peak of GPU memory.
        measured: Measured peak.
        error_percent: Prediction against measurement: allocated, reserved, device; negative where it was too low.
        host_bytes: Largest resident set seen after a step.
        epoch_s: Time of an epoch of the named data set, without validation and checkpoints.
        ceiling_flops: Operations in a second of the model's own matrix products alone, on this device.
        useful_flops: Useful operations in a second of the steps.
        ceiling_share: The second by the first.
        time: Where the time of a step goes.
        baseline: The plain path beside it.
        notices: Sentences about this row.
    """

    name: str
    config: dict[str, Any]
    status: Status
    exit_code: ExitCode
    set: SetName | None = None
    reason: str | None = None
    data: str | None = None
    precision: str | None = None
    blocks: str | None = None
    attention: str | None = None
    plan: PlanFigures | None = None
    speed: Speed | None = None
    predicted: MemoryFigures | None = None
    measured: MemoryFigures | None = None
    error_percent: dict[str, float] = field(default_factory=dict)
    host_bytes: int | None = None
    epoch_s: float | None = None
    ceiling_flops: float | None = None
    useful_flops: float | None = None
    ceiling_share: float | None = None
    time: TimeShares | None = None
    baseline: BaselineResult | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetSummary:
    """How good the memory predictions of a set of rows were.

    Attributes:
        num_rows: Rows measured.
        mean_absolute_percent: Mean size of the error of each figure.
        worst_under_percent: The prediction that was most too low of each figure; 0 where none was.
    """

    num_rows: int
    mean_absolute_percent: dict[str, float]
    worst_under_percent: dict[str, float]


@dataclass(frozen=True)
class DeviceFigures:
    """The device a bench ran on; the two memory figures are None on a CPU.

    Attributes:
        name: The device.
        total_bytes: Its memory.
        used_before_bytes: What was in use there before the bench took any.
    """

    name: str
    total_bytes: int | None = None
    used_before_bytes: int | None = None


@dataclass(frozen=True)
class BenchResult:
    """What a bench found.

    Attributes:
        device: Where it ran.
        versions: dsft, Python, packages, CUDA, driver.
        num_steps: Steps measured for each row.
        num_warmup_steps: Steps before those.
        rows: The rows that are finished, in their order.
        num_rows: How many there are in all.
        sets: Summary of each set of a grid.
        format: Version of this record.
    """

    device: DeviceFigures
    versions: dict[str, str]
    num_steps: int
    num_warmup_steps: int
    rows: tuple[RowResult, ...]
    num_rows: int
    sets: dict[str, SetSummary] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def exit_code(self) -> ExitCode:
        """0 if any row was measured, else the code that all rows share, else 1."""
        codes = {row.exit_code for row in self.rows}
        if ExitCode.DONE in codes:
            return ExitCode.DONE
        return codes.pop() if len(codes) == 1 else ExitCode.FAILURE


def summarize_sets(rows: Sequence[RowResult]) -> dict[str, SetSummary]:
    """Return the summary of each set that rows with a prediction belong to."""
    summaries = {}
    for name in ("fitted", "held_out"):
        errors = [row.error_percent for row in rows if row.set == name and row.error_percent]
        figures = dict.fromkeys(figure for error in errors for figure in error)
        by_figure = {figure: [error[figure] for error in errors if figure in error] for figure in figures}
        if errors:
            summaries[name] = SetSummary(
                num_rows=len(errors),
                mean_absolute_percent={
                    figure: sum(map(abs, values)) / len(values) for figure, values in by_figure.items()
                },
                worst_under_percent={figure: min(0.0, *values) for figure, values in by_figure.items()},
            )
    return summaries
