"""What a bench shows: every figure that was measured, failures with their reason, and Markdown that holds."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from dsft.bench.comparison import RowComparison
from dsft.bench.figures import MemoryFigures, StepFigures, measure_speed
from dsft.bench.options import Progress
from dsft.bench.result import (
    BaselineResult,
    BenchResult,
    DeviceFigures,
    PlanFigures,
    RowResult,
    SetSummary,
    TimeShares,
)
from dsft.cli.output import Output
from dsft.cli.views.bench import describe_progress, describe_row, format_markdown, render_bench
from dsft.core.errors import ExitCode
from dsft.core.units import GIB

PLAN = PlanFigures(4, 4096, True, 9, 32, True, True)
STEPS = [StepFigures(seconds, 16384, 16368, 18000, 4) for seconds in (1.5, 1.6, 1.7)]
ROW = RowResult(
    "balanced",
    {},
    "done",
    ExitCode.DONE,
    set="held_out",
    data="random tokens",
    precision="bf16",
    attention="PyTorch variable-length flash kernel",
    plan=PLAN,
    speed=measure_speed(STEPS),
    predicted=MemoryFigures(17 * GIB, 18 * GIB, 20 * GIB),
    measured=MemoryFigures(16 * GIB, 18 * GIB, 25 * GIB),
    error_percent={"allocated": 6.25, "reserved": 0.0, "device": -20.0},
    host_bytes=3 * GIB,
    epoch_s=2700.0,
    ceiling_flops=600e12,
    useful_flops=270e12,
    ceiling_share=0.45,
    time=TimeShares({"matrix products": 0.6, "attention": 0.1, "GPU idle": 0.3}, "kernels"),
    baseline=BaselineResult("done", speed=measure_speed([StepFigures(10.0, 16384, 16368, 18000, 16)]), speedup=6.25),
)
FAILED = RowResult(
    "quality",
    {},
    "does_not_fit",
    ExitCode.DOES_NOT_FIT,
    reason="does not fit: needs 30.0 GiB of 23.5 GiB",
    plan=PLAN,
)


def make_result(*rows: RowResult, **changes: object) -> BenchResult:
    device = DeviceFigures("NVIDIA GeForce RTX 4090", 24 * GIB, GIB // 2)
    return replace(BenchResult(device, {"dsft": "1", "driver": "580"}, 3, 2, rows, len(rows)), **changes)


def draw(
    result: BenchResult, comparisons: list[RowComparison] | None = None, width: int = 120, encoding="utf-8"
) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    output = Output()
    output.stdout = Console(file=file, width=width)
    output.show(render_bench(result, comparisons))
    file.seek(0)
    return file.read()


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_shows_what_was_measured() -> None:
    drawn = squeezed(draw(make_result(ROW), width=160))
    for words in (
        "NVIDIA GeForce RTX 4090 (0.5 GiB in use before); 1 of 1 row, 3 steps each after 2 to warm up; dsft 1",
        "balanced 4,096 tokens · 9/32 recompute · paged 10,240 1.60 s 18.00 (+0.0 %) 25.00 (-20.0 %)",
        "45 min 00 s 45 % 6.25×",
        "10,240 tok/s, 10,230 of them targets; 11,250 counted with padding",
        "1.600 s median, middle half 1.550 to 1.650, all 1.500 to 1.700 (3 steps)",
        "allocated: 16.00 GiB, predicted 17.00 (+6.25 %)",
        "device: 25.00 GiB, predicted 20.00 (-20.00 %)",
        "270 of 600 TFLOP/s, 45 % of what the model's matrix products alone reach here",
        "matrix products 60 %, attention 10 %, GPU idle 30 %",
        "1,638 tok/s, 10 s a step; dsft is 6.25× as fast",
        "45 min 00 s, validation and checkpoints not counted",
    ):
        assert words in drawn, words


def test_a_row_that_failed_shows_its_reason() -> None:
    drawn = squeezed(draw(make_result(ROW, FAILED)))
    assert "does not fit – " in drawn
    assert "✗ quality: does not fit: needs 30.0 GiB of 23.5 GiB" in drawn


def test_columns_that_no_row_fills_are_left_out() -> None:
    drawn = draw(
        make_result(replace(ROW, measured=None, predicted=None, epoch_s=None, baseline=None, ceiling_share=None))
    )
    head = next(line for line in drawn.splitlines() if line.startswith("configuration"))
    assert head.split() == ["configuration", "plan", "tok/s", "step"]
    assert "3.0 GiB of host memory" in drawn


def test_a_grid_is_shown_as_its_table_and_sets() -> None:
    rows = [replace(ROW, name=f"row {number}") for number in range(5)]
    rows[3] = replace(rows[3], notices=("not freed",))
    sets = {"held_out": SetSummary(5, {"reserved": 1.25}, {"reserved": -0.5})}
    drawn = squeezed(draw(make_result(*rows, sets=sets)))
    assert "middle half" not in drawn
    assert "Data: random tokens." in drawn
    assert "row 3: not freed" in drawn
    assert "held out (5 rows): reserved 1.25 % off on average, -0.50 % at worst too low" in drawn


def test_ratios_are_shown() -> None:
    drawn = squeezed(draw(make_result(ROW), [RowComparison("balanced", 1.5, 0.667, None, None)]))
    assert "new / old tok/s step reserved on device balanced 1.500 0.667 – –" in drawn
    assert "No row has the name" in draw(make_result(ROW), [])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_without_unicode_get_the_table_too(encoding: str) -> None:
    assert "balanced" in draw(make_result(ROW, FAILED), encoding=encoding)


def test_markdown_is_one_table_with_as_many_cells_in_each_line() -> None:
    odd = replace(FAILED, name="a|b", reason="failed:\nx | y")
    lines = format_markdown(make_result(ROW, odd)).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "| 18.00 / 18.00, +0.00 % | 20.00 / 25.00, -20.00 % | 45 % | 6.25× |" in table[2]
    assert "| 10,240 | 11,250 | 10,230 | 1.600 s (1.500 to 1.700) | 45 min 00 s |" in table[2]
    assert "| a\\|b |" in table[3] and "failed: x \\| y" in table[3]
    assert "balanced, where the time of a step goes: matrix products 60 %, attention 10 %, GPU idle 30 %." in lines


def test_markdown_holds_sets_and_ratios() -> None:
    sets = {"fitted": SetSummary(1, {"device": 0.5}, {"device": 0.0})}
    text = format_markdown(make_result(ROW, sets=sets), [RowComparison("balanced", 2.0, 0.5, 1.0, None)])
    assert "fitted (1 row): device 0.50 % off on average, 0.00 % at worst too low" in text
    assert "| balanced | 2.000 | 0.500 | 1.000 | – |" in text
    assert "No row has the name" in format_markdown(make_result(ROW), [])


def test_progress_and_rows_are_one_line_each() -> None:
    assert (
        describe_progress(Progress(2, 3, "quality", "measure", 4, 12)) == "row 2 of 3 · quality · measure, step 4 of 12"
    )
    assert describe_progress(Progress(0, 3, "", "load PyTorch")) == "load PyTorch"
    assert describe_row(ROW) == "balanced: 10,240 tok/s, 18.0 GiB reserved"
    assert describe_row(FAILED) == "quality: does not fit: needs 30.0 GiB of 23.5 GiB"
