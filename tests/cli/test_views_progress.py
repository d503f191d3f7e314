"""The progress display: its plain lines, and that on no console it ever harms the run."""

import dataclasses
import errno
import io
import itertools
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from dsft.cli.output import Output
from dsft.cli.views.progress import ProgressView, _LinePainter, _LivePainter
from dsft.cli.views.progress_lines import LineChooser, format_event
from dsft.core.units import GIB
from dsft.train.events import (
    CheckpointSaved,
    Event,
    InterruptRequested,
    Notice,
    Phase,
    PlanChanged,
    PrepareProgress,
    Validated,
)
from tests.cli.progress_events import FULL, RUN, make_step

CHANGE = PlanChanged(7, {}, {}, "20 blocks recompute, not 9", "CUDA out of memory.")

# Plain lines


def test_lines_can_be_grepped() -> None:
    assert format_event(make_step(12, on_gpu=False)) == (
        "step 12/300  loss 1.2345  lr 1.9e-04  tok/s 2331  eta 12 min 03 s"
    )
    assert format_event(make_step(12)).endswith("eta 12 min 03 s  gpu 18.3/24.0 GiB")
    assert format_event(Validated(50, 0.9, 10, True, 2.0)) == "validation at step 50  loss 0.9000  best  took 2.0 s"
    assert format_event(Validated(50, 0.9, 10, False, 2.0)) == "validation at step 50  loss 0.9000  took 2.0 s"
    assert format_event(CheckpointSaved(50, "out/checkpoint-50")) == "checkpoint at step 50  out/checkpoint-50"
    assert format_event(Notice("x is used", "warning")) == "warning: x is used"
    assert "press Ctrl-C again" in format_event(InterruptRequested("SIGINT"))
    assert "send SIGTERM again" in format_event(InterruptRequested("SIGTERM"))
    assert "effective batch 16 = 4 x 4" in format_event(RUN)
    assert ": 300 steps, " in format_event(RUN)
    assert ": 1 step, " in format_event(dataclasses.replace(RUN, num_steps=1))
    assert format_event(PrepareProgress(1)) == "1 row tokenized"


def test_a_plan_and_its_change_are_told() -> None:
    planned = dataclasses.replace(
        RUN, micro_batch_tokens=4096, num_recomputed_blocks=9, num_blocks=32, predicted_memory_bytes=18 * GIB
    )
    line = format_event(planned)
    assert "effective batch 16 in passes of up to 4,096 tokens" in line
    assert line.endswith("9 of 32 blocks recompute, 18.0 GiB predicted")
    assert format_event(CHANGE) == (
        "warning: GPU memory ran out in step 7; it is done again with 20 blocks recompute, not 9"
    )
    first = dataclasses.replace(CHANGE, step=0)
    assert "ran out in the rehearsal of the largest micro-batch" in format_event(first)
    assert LineChooser().choose(CHANGE, 0.0)


def steps_printed(interval_s: float, num_steps: int) -> list[int]:
    chooser = LineChooser()
    lines = [
        line
        for step in range(1, num_steps + 1)
        for line in chooser.choose(make_step(step, num_steps=num_steps), step * interval_s)
    ]
    return [int(line.split("/")[0].removeprefix("step ")) for line in lines]


def test_slow_steps_are_all_printed() -> None:
    assert steps_printed(1.5, 10) == list(range(1, 11))


def test_fast_steps_make_about_one_line_a_second_with_first_and_last() -> None:
    printed = steps_printed(0.1, 95)
    assert (printed[0], printed[-1]) == (1, 95)
    assert len(printed) in {10, 11}
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(printed[:-1]))


def test_validation_checkpoints_and_notices_are_never_left_out() -> None:
    chooser = LineChooser()
    events = [Validated(1, 0.9, 10, True, 2.0), CheckpointSaved(1, "a"), Notice("b"), InterruptRequested("SIGTERM")]
    assert all(chooser.choose(event, 0.0) for event in events * 2)


def test_rows_are_counted_now_and_then() -> None:
    chooser = LineChooser()
    chooser.choose(Phase("read the data"), 100.0)
    lines = [chooser.choose(PrepareProgress(row), 100 + row / 1000) for row in range(1000, 31_000, 1000)]
    assert [line for line in lines if line] == [
        ["10,000 rows tokenized"],
        ["20,000 rows tokenized"],
        ["30,000 rows tokenized"],
    ]


def test_a_run_cut_short_still_prints_its_last_step() -> None:
    chooser = LineChooser()
    chooser.choose(make_step(1), 0.0)
    chooser.choose(make_step(2), 0.1)
    assert chooser.finish() == [format_event(make_step(2))]
    assert chooser.finish() == []


# On a console


class Terminal(io.StringIO):
    """Says of itself that it is one."""

    def isatty(self) -> bool:
        return True


def show(events: Iterable[Event], file: io.StringIO, **options: Any) -> str:
    with ProgressView(Console(file=file, width=100, height=40, **options)) as sink:
        for event in events:
            sink(event)
    return file.getvalue()


def test_a_file_gets_lines_without_control_codes() -> None:
    written = show(FULL, io.StringIO())
    assert "\x1b" not in written
    assert written.splitlines()[0] == "find the model ..."
    assert "checkpoint at step 20  results_deepseek/checkpoint-20" in written.splitlines()


def test_long_lines_are_not_broken() -> None:
    path = "long/" * 60
    assert f"checkpoint at step 1  {path}\n" in show([CheckpointSaved(1, path)], io.StringIO())


def test_a_file_gets_no_live_area_when_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    written = show(FULL, io.StringIO())
    assert "\x1b[2K" not in written
    assert "checkpoint at step 20  results_deepseek/checkpoint-20" in written.splitlines()


def test_a_simple_terminal_gets_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[2K" not in show(FULL, Terminal())


def test_a_terminal_gets_the_area_and_notices_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    written = show([*FULL, Notice("flash-attn is missing", "warning")], Terminal())
    notice, last_area = written.rindex("warning: flash-attn is missing"), written.rindex("╭─")
    assert "ran out in step 7" in show([*FULL, CHANGE], Terminal())
    assert notice < last_area
    assert "21/300" in written[last_area:]
    assert written.rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_the_terminal_is_put_right_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    view = ProgressView(Console(file=file, width=100, height=40))
    view.__enter__()(Phase("load the model"))
    view.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "✗" in file.getvalue()
    assert file.getvalue().rstrip("\n").endswith("\x1b[?25h")


class LostFile(io.StringIO):
    """Takes some writes and then fails, for good or a few times, as a terminal that was closed."""

    def __init__(self, error: OSError, num_writes: int, num_failures: int = 10**9, *, is_terminal: bool = True) -> None:
        super().__init__()
        self._error = error
        self._num_writes = num_writes
        self._num_failures = num_failures
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> int:
        self._num_writes -= 1
        if -self._num_failures <= self._num_writes < 0:
            raise self._error
        return super().write(text)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), BrokenPipeError()])
@pytest.mark.parametrize("num_writes", [0, 1, 3])
@pytest.mark.parametrize("painter", [_LivePainter, _LinePainter])
def test_losing_the_screen_does_not_end_the_run(
    error: OSError, num_writes: int, painter: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    lost = LostFile(error, num_writes, is_terminal=painter is _LivePainter)
    monkeypatch.setattr(sys, "stderr", lost)
    view = ProgressView(Output().stderr)
    assert type(view._painter) is painter
    num_taken = 0
    with view as sink:
        for event in [*FULL, Notice("a"), *FULL, Notice("b")]:
            sink(event)
            num_taken += 1
    assert num_taken == 2 * len(FULL) + 2
    assert sys.stderr is lost


@pytest.mark.parametrize("num_writes", [1, 2, 3])
def test_a_terminal_that_failed_once_is_put_right_too(num_writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = LostFile(OSError(errno.EIO, "Input/output error"), num_writes, num_failures=1)
    with ProgressView(Console(file=terminal, width=100, height=40)) as sink:
        for number in range(num_writes):
            sink(Notice(str(number)))
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")
