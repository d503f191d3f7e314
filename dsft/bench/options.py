"""How a bench measures, and whom it tells what."""

from collections.abc import Callable
from dataclasses import dataclass

from dsft.bench.result import BenchResult, RowResult


@dataclass(frozen=True)
class BenchOptions:
    """How rows are measured.

    Attributes:
        num_steps: Steps measured.
        num_warmup_steps: Steps run before those.
        ceiling_s: How long the matrix products alone are timed; 0 leaves that out.
        is_profiled: Whether to look where a step's time goes.
        has_baseline: Whether to run the plain path too.
        use_random: Take random samples whatever data the rows name.
    """

    num_steps: int = 10
    num_warmup_steps: int = 2
    ceiling_s: float = 5.0
    is_profiled: bool = True
    has_baseline: bool = False
    use_random: bool = False


@dataclass(frozen=True)
class Progress:
    """Where a bench is.

    Attributes:
        row: The row's number, from 1; 0 where all rows are meant.
        num_rows: Rows in all.
        name: The row's name.
        phase: What is being done.
        step: The step that runs, from 1; 0 outside of steps.
        num_steps: Steps in this phase.
    """

    row: int
    num_rows: int
    name: str
    phase: str
    step: int = 0
    num_steps: int = 0


@dataclass(frozen=True)
class BenchSink:
    """Whom a bench tells what.

    Attributes:
        on_progress: Where it is.
        on_row: A row whose own measurement is done, or that could not be measured.
        on_result: Everything found so far, after each addition to it.
    """

    on_progress: Callable[[Progress], None]
    on_row: Callable[[RowResult], None]
    on_result: Callable[[BenchResult], None]
