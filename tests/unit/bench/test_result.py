"""Exit codes and summaries of sets."""

import pytest

from dsft.bench.result import summarize_sets
from dsft.core.errors import ExitCode
from tests.unit.bench.bench_results import make_result, make_row


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([ExitCode.DONE, ExitCode.FAILURE], ExitCode.DONE),
        ([ExitCode.DOES_NOT_FIT, ExitCode.DOES_NOT_FIT], ExitCode.DOES_NOT_FIT),
        ([ExitCode.NO_GPU], ExitCode.NO_GPU),
        ([ExitCode.WRONG_INPUT, ExitCode.WRONG_INPUT], ExitCode.WRONG_INPUT),
        ([ExitCode.DOES_NOT_FIT, ExitCode.WRONG_INPUT], ExitCode.FAILURE),
        ([], ExitCode.FAILURE),
    ],
)
def test_the_exit_code_is_the_one_that_all_rows_share_where_none_worked(codes: list[ExitCode], code: ExitCode) -> None:
    assert make_result(*(make_row(exit_code=each) for each in codes)).exit_code == code


def test_sets_are_summarized_by_mean_error_and_worst_underestimate() -> None:
    rows = [
        make_row("a", set="held_out", error_percent={"reserved": 1.0, "device": 2.0}),
        make_row("b", set="held_out", error_percent={"reserved": -3.0}),
        make_row("c", set="fitted", error_percent={"reserved": 0.5}),
        make_row("d", error_percent={"reserved": 50.0}),
        make_row("e", exit_code=ExitCode.FAILURE, set="held_out"),
    ]
    sets = summarize_sets(rows)
    assert sets["held_out"].num_rows == 2
    assert sets["held_out"].mean_absolute_percent == {"reserved": 2.0, "device": 2.0}
    assert sets["held_out"].worst_under_percent == {"reserved": -3.0, "device": 0.0}
    assert sets["fitted"].mean_absolute_percent == {"reserved": 0.5}
