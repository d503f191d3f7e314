"""The progress display: what state events make, what is drawn of it at any size, and that it never harms the run."""

import dataclasses
import errno
import io
import itertools
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from dsft.cli.output import Output
from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import draw_bar, draw_sparkline, flow
from dsft.cli.views.progress import ProgressView, _LinePainter, _LivePainter
from dsft.cli.views.progress_lines import LineChooser, format_event
from dsft.cli.views.progress_panel import render_progress
from dsft.cli.views.progress_state import ProgressState, advance, finish, measure_trend
from dsft.core.units import GIB
from dsft.train.events import (
    CheckpointSaved,
    Event,
    InterruptRequested,
    Notice,
    Phase,
    PrepareProgress,
    RunStarted,
    StepDone,
    Validated,
)

RUN = RunStarted(
    run_name="trained_deepseek",
    model_name="deepseek-ai/deepseek-coder-6.7b-base",
    device="NVIDIA GeForce RTX 4090",
    precision="bf16",
    attention="PyTorch variable-length flash kernel",
    optimizer="paged AdamW, 32 bit",
    num_steps=300,
    first_step=0,
    num_epochs=3.0,
    effective_batch_size=16,
    micro_batch_size=4,
    num_train_samples=19612,
    num_validation_samples=400,
    num_trainable_parameters=159_907_840,
    num_parameters=6_900_420_608,
)


def make_step(step: int, *, loss: float = 1.2345, on_gpu: bool = True, num_steps: int = 300) -> StepDone:
    return StepDone(
        step=step,
        num_steps=num_steps,
        epoch=3 * step / num_steps,
        loss=loss,
        grad_norm=0.2811,
        learning_rate=1.9e-4,
        num_tokens=2400,
        num_target_tokens=1200,
        step_s=0.98,
        tok_per_s=2331.4,
        eta_s=723.0,
        memory_used_bytes=18 * GIB + GIB // 3 if on_gpu else None,
        memory_total_bytes=24 * GIB if on_gpu else None,
    )


def state_after(events: Iterable[Event], start_s: float = 0.0) -> ProgressState:
    """Return the state after events that come one a second."""
    state = ProgressState()
    for now_s, event in enumerate(events):
        state = advance(state, event, start_s + now_s)
    return state


def draw(state: ProgressState, width: int = 100, height: int = 40, now_s: float = 100.0, **console: Any) -> list[str]:
    """Return the lines of the live area."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=console.pop("encoding", "utf-8"))
    target = Console(file=file, width=width, height=height, **console)
    target.print(AsciiFallback(render_progress(state, width, height, now_s)))
    file.seek(0)
    return file.read().rstrip("\n").split("\n")


def text(state: ProgressState, **options: Any) -> str:
    return "\n".join(draw(state, **options))


FULL = [
    Phase("find the model"),
    RUN,
    *(make_step(step, loss=2 - step / 100) for step in range(1, 21)),
    Validated(20, 0.95, 9000, True, 2.0),
    CheckpointSaved(20, "results_deepseek/checkpoint-20"),
    make_step(21, loss=1.7),
]


# The state


def test_the_newest_losses_are_kept_and_no_more() -> None:
    state = state_after([RUN, *(make_step(step, loss=float(step)) for step in range(1, 301))])
    assert state.losses == tuple(float(step) for step in range(237, 301))


def test_the_best_validation_is_remembered_when_a_worse_one_comes() -> None:
    best, worse = Validated(10, 0.8, 100, True, 1.0), Validated(20, 0.9, 100, False, 1.0)
    state = state_after([RUN, best, worse])
    assert (state.validation, state.best) == (worse, best)


def test_a_phase_ends_with_the_next_one_and_keeps_its_rows() -> None:
    state = state_after([Phase("read the data"), PrepareProgress(4000), PrepareProgress(6000), Phase("load the model")])
    first, second = state.phases
    assert (first.name, first.started_s, first.ended_s, first.num_rows) == ("read the data", 0, 3, 6000)
    assert (second.ended_s, second.num_rows) == (None, None)


def test_the_time_left_counts_down_between_steps_and_stops_at_zero() -> None:
    state = state_after([RUN, make_step(1)])
    assert [state.eta_s(now_s) for now_s in (1.0, 11.0, 2000.0)] == [723.0, 713.0, 0.0]


def test_the_clock_stops_at_the_end() -> None:
    state = finish(state_after([RUN, make_step(1)]), 60.0, is_failed=False)
    assert state.elapsed_s(999.0) == 60.0


@pytest.mark.parametrize(
    ("losses", "direction", "num_steps"),
    [
        ((2.0, 1.0), -1, 1),
        ((1.0, 2.0), 1, 1),
        ((1.0, 1.001), 0, 1),
        ((*[2.0] * 10, *[1.0] * 10), -1, 10),
        # One bad step is noise: the means decide.
        ((*[2.0] * 10, *[1.0] * 9, 2.5), -1, 10),
        # Only the last two windows count.
        ((*[9.0] * 30, *[1.0] * 10, *[1.5] * 10), 1, 10),
    ],
)
def test_the_trend_compares_two_windows(losses: tuple[float, ...], direction: int, num_steps: int) -> None:
    trend = measure_trend(losses)
    assert trend is not None
    assert (trend.direction, trend.num_steps) == (direction, num_steps)
    assert trend.mean == pytest.approx(sum(losses[-num_steps:]) / num_steps)


def test_one_loss_has_no_trend() -> None:
    assert measure_trend(()) is None
    assert measure_trend((1.0,)) is None


# The live area


def test_every_figure_of_the_run_is_shown() -> None:
    drawn = text(state_after(FULL), now_s=24.0)
    for words in (
        "deepseek-ai/deepseek-coder-6.7b-base",
        "NVIDIA GeForce RTX 4090 · bf16 · PyTorch variable-length flash kernel",
        "batch 16 = 4 × 4 · paged AdamW, 32 bit · 19,612 samples",
        "trains 160 M of 6.9 B weights (2.3 %)",
        "  7 %  21/300",
        "epoch 0.21 of 3 · 23 s elapsed · 12 min 03 s left",
        "1.7000 ↓ ",
        "0.9500 ★ best · step 20",
        "lr 1.90e-04 · grad norm 0.281",
        "2,331 tok/s · 0.98 s a step",
        "18.3 of 24.0 GiB",
        "step 20 · results_deepseek/checkpoint-20",
    ):
        assert words in drawn, words


def test_a_cpu_run_shows_no_gpu_memory() -> None:
    assert "GPU" not in text(state_after([dataclasses.replace(RUN, device="CPU"), make_step(1, on_gpu=False)]))


def test_a_worse_validation_names_the_best_one() -> None:
    state = state_after([RUN, make_step(1), Validated(1, 0.8, 9, True, 1.0), Validated(2, 0.9, 9, False, 1.0)])
    assert "0.9000 · step 2 · best 0.8000 at step 1" in text(state)


def test_hundred_percent_is_the_last_step_alone() -> None:
    assert " 99 %  2999/3000" in text(state_after([RUN_OF_3000, make_step(2999, num_steps=3000)]))
    assert "100 %  3000/3000" in text(state_after([RUN_OF_3000, make_step(3000, num_steps=3000)]))


RUN_OF_3000 = dataclasses.replace(RUN, num_steps=3000)


def test_a_resumed_run_begins_at_its_step() -> None:
    assert " 50 %  150/300" in text(state_after([dataclasses.replace(RUN, first_step=150)]))


@pytest.mark.parametrize("width", [20, 40, 63, 64, 66, 67, 80, 100, 250])
@pytest.mark.parametrize("height", [3, 9, 15, 24, 60])
@pytest.mark.parametrize("num_events", [1, 2, 3, 30])
def test_the_area_fits_the_terminal_and_leaves_room_for_the_echo_of_control_c(
    width: int, height: int, num_events: int
) -> None:
    lines = draw(state_after(FULL[:num_events]), width, height)
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width - 3


def test_a_low_terminal_keeps_what_matters_most() -> None:
    state = advance(state_after(FULL), InterruptRequested("SIGINT"), 50.0)
    drawn = text(state, height=6)
    assert "21/300" in drawn
    assert "left" in drawn
    assert "1.7000" in drawn
    assert "press Ctrl-C again" in drawn
    assert "optimizer" not in drawn


def test_a_narrow_terminal_shows_the_whole_figures() -> None:
    drawn = text(state_after(FULL), width=40)
    for words in ("lr 1.90e-04 · grad norm 0.281", "2,331 tok/s · 0.98 s a step", "18.3 of 24.0 GiB", "step 20"):
        assert words in drawn, words


def test_without_unicode_everything_is_ascii_and_stands_where_it_stood() -> None:
    state = advance(state_after(FULL), InterruptRequested("SIGINT"), 50.0)
    for shown in (state, state_after(FULL[:1])):
        unicode_lines, ascii_lines = draw(shown), draw(shown, encoding="ascii")
        assert all(line.isascii() for line in ascii_lines)
        assert "?" not in "".join(ascii_lines)
        assert [cell_len(line) for line in ascii_lines] == [cell_len(line) for line in unicode_lines]


def test_names_without_ascii_letters_keep_their_width() -> None:
    state = state_after([dataclasses.replace(RUN, model_name="模型/é", run_name="模")])
    unicode_lines, ascii_lines = draw(state), draw(state, encoding="ascii")
    assert "????/?" in "".join(ascii_lines)
    assert [cell_len(line) for line in ascii_lines] == [cell_len(line) for line in unicode_lines]
    assert "????/é" in text(state, encoding="latin-1")


def test_without_colour_no_colour_is_written_and_the_bar_still_reads() -> None:
    options: dict[str, Any] = {"force_terminal": True, "no_color": True, "color_system": "truecolor"}
    drawn = text(state_after([RUN, make_step(150)]), **options)
    assert "\x1b[3" not in drawn.replace("\x1b[39", "")
    bar = draw_bar(0.5, 10, "green").plain
    assert bar == "━━━━━─────"


def test_an_interrupt_is_answered_until_the_end() -> None:
    state = advance(state_after(FULL), InterruptRequested("SIGINT"), 50.0)
    assert "finishing this step and saving; press Ctrl-C again to stop at once" in text(state)
    assert "finishing" not in text(finish(state, 60.0, is_failed=True))


def test_before_the_first_step_phases_tick() -> None:
    state = state_after([Phase("find the model"), Phase("read the data"), PrepareProgress(12000)])
    first, second = draw(state, now_s=3.5), draw(state, now_s=3.75)
    assert first[0] == "✓ find the model  1.0 s"
    assert first[1].endswith("read the data  2.5 s · 12,000 rows tokenized")
    assert first[1][0] != second[1][0]


def test_a_phase_that_fails_is_marked() -> None:
    state = state_after([Phase("find the model")])
    assert draw(finish(state, 2.0, is_failed=True)) == ["✗ find the model  2.0 s"]
    assert draw(finish(state, 2.0, is_failed=False)) == ["✓ find the model  2.0 s"]


def test_work_after_the_last_step_is_named() -> None:
    assert "save the adapter  5.0 s" in text(state_after([RUN, make_step(300), Phase("save the adapter")]), now_s=7.0)


def test_sparklines_and_flows() -> None:
    assert draw_sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert draw_sparkline([2.0, 2.0]) == "▄▄"
    assert draw_sparkline([1.0, float("nan"), 2.0]) == "▁!█"
    assert draw_sparkline([]) == ""
    assert [line.plain for line in flow(["aaa", "bbb", "ccc"], 9)] == ["aaa · bbb", "ccc"]


def test_bars_are_as_wide_as_asked() -> None:
    assert all(len(draw_bar(fraction / 50, 13, "").plain) == 13 for fraction in range(-5, 60))


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
