"""Exit codes, summaries of sets, ratios to an earlier result, and the file a result is kept in."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from dsft.bench.figures import MemoryFigures, StepFigures, measure_speed
from dsft.bench.result import (
    BenchResult,
    DeviceFigures,
    RowResult,
    compare_results,
    read_record,
    summarize_sets,
    write_record,
)
from dsft.core.errors import ConfigError, ExitCode


def make_row(
    name: str = "row", *, status="done", step_s: float = 1.0, reserved: int | None = 100, **changes
) -> RowResult:
    is_done = status == "done"
    return RowResult(
        name,
        {},
        status,
        speed=measure_speed([StepFigures(step_s, 100, 50, 100, 1)]) if is_done else None,
        measured=MemoryFigures(50, reserved, None) if is_done and reserved else None,
        **changes,
    )


def make_result(*rows: RowResult) -> BenchResult:
    return BenchResult(DeviceFigures("CPU"), {}, 3, 1, rows, len(rows))


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["done", "failed"], ExitCode.DONE),
        (["does_not_fit", "out_of_memory"], ExitCode.DOES_NOT_FIT),
        (["does_not_fit", "failed"], ExitCode.FAILURE),
        ([], ExitCode.FAILURE),
    ],
)
def test_the_exit_code_follows_from_the_rows(statuses: list, code: ExitCode) -> None:
    assert make_result(*(make_row(status=status) for status in statuses)).exit_code == code


def test_sets_are_summarized_by_mean_error_and_worst_underestimate() -> None:
    rows = [
        make_row("a", set="held_out", error_percent={"reserved": 1.0, "device": 2.0}),
        make_row("b", set="held_out", error_percent={"reserved": -3.0}),
        make_row("c", set="fitted", error_percent={"reserved": 0.5}),
        make_row("d", error_percent={"reserved": 50.0}),
        make_row("e", set="held_out", status="failed"),
    ]
    sets = summarize_sets(rows)
    assert sets["held_out"].num_rows == 2
    assert sets["held_out"].mean_absolute_percent == {"reserved": 2.0, "device": 2.0}
    assert sets["held_out"].worst_under_percent == {"reserved": -3.0, "device": 0.0}
    assert sets["fitted"].mean_absolute_percent == {"reserved": 0.5}


def test_ratios_are_new_by_old() -> None:
    old = asdict(make_result(make_row("same", step_s=2.0, reserved=200), make_row("gone")))
    new = make_result(make_row("same", step_s=1.0, reserved=100), make_row("fresh"))
    [ratio] = compare_results(new, json.loads(json.dumps(old)))
    assert ratio.name == "same"
    assert ratio.tok_per_s == 2.0
    assert ratio.step_s == 0.5
    assert ratio.reserved_bytes == 0.5
    assert ratio.device_bytes is None


def test_a_row_that_failed_has_no_ratio() -> None:
    old = asdict(make_result(make_row("same", status="failed")))
    [ratio] = compare_results(make_result(make_row("same")), old)
    assert (ratio.tok_per_s, ratio.step_s) == (None, None)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")
    write_record(json.dumps(asdict(make_result(make_row()))), path)
    assert read_record(path)["rows"][0]["name"] == "row"
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [3]}', '{"rows": [], "format": 99}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="--compare"):
        read_record(path)
