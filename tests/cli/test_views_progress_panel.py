"""The progress display: what state events make, and what is drawn of it at any size."""

import dataclasses
import io
from collections.abc import Iterable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import count_nouns, draw_bar, draw_sparkline, flow
from dsft.cli.views.progress_panel import render_progress
from dsft.cli.views.progress_state import ProgressState, advance, finish, measure_trend
from dsft.core.units import GIB
from dsft.train.events import Event, InterruptRequested, Phase, PrepareProgress, Validated
from tests.cli.progress_events import FULL, RUN, make_step


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


def test_the_plan_is_in_the_header() -> None:
    planned = dataclasses.replace(
        RUN, micro_batch_tokens=4096, num_recomputed_blocks=9, num_blocks=32, predicted_memory_bytes=18 * GIB
    )
    drawn = text(state_after([planned]))
    assert "batch 16 in passes of up to 4,096 tokens · 9 of 32 blocks recompute · 18.0 GiB predicted" in drawn


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


@pytest.mark.parametrize(("count", "drawn"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows")])
def test_only_one_is_singular(count: int, drawn: str) -> None:
    assert count_nouns(count, "row") == drawn


def test_a_run_of_one_of_each_is_told_without_plurals() -> None:
    state = state_after([dataclasses.replace(RUN, num_train_samples=1)])
    assert " · 1 sample\n" in "\n".join(line.rstrip("│ ") for line in draw(state)).replace(" · trains", "\n")


def test_bars_are_as_wide_as_asked() -> None:
    assert all(len(draw_bar(fraction / 50, 13, "").plain) == 13 for fraction in range(-5, 60))
