"""Results of a bench as tests need them, without a bench."""

from typing import Any

from dsft.bench.figures import MemoryFigures, StepFigures, measure_speed
from dsft.bench.result import BenchResult, DeviceFigures, RowResult
from dsft.core.errors import ExitCode


def make_row(
    name: str = "row",
    *,
    exit_code: ExitCode = ExitCode.DONE,
    step_s: float = 1.0,
    reserved: int | None = 100,
    **changes: Any,
) -> RowResult:
    """Return a row that was measured, or failed where its exit code says so."""
    is_done = exit_code == ExitCode.DONE
    return RowResult(
        name,
        {},
        "done" if is_done else "failed",
        exit_code,
        speed=measure_speed([StepFigures(step_s, 100, 50, 100, 1)]) if is_done else None,
        measured=MemoryFigures(50, reserved, None) if is_done and reserved else None,
        **changes,
    )


def make_result(*rows: RowResult) -> BenchResult:
    """Return the result of a bench of these rows."""
    return BenchResult(DeviceFigures("CPU"), {}, 3, 1, rows, len(rows))
