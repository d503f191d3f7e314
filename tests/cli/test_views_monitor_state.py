"""What the monitor's screen remembers, and what keys do to it; pieces that rows are made of."""

from dataclasses import replace

import pytest
from rich.cells import cell_len

from dsft.cli.views.drawing import draw_history
from dsft.cli.views.monitor.figures import format_memory, format_rate, format_share, format_size
from dsft.cli.views.monitor.line import Line, clip_text, draw_heading, flow_lines, join_fitting, wrap_words
from dsft.cli.views.monitor.state import HISTORY_LENGTH, MonitorState, SortOrder, list_processes, newest
from dsft.core.units import GIB
from dsft.monitor.sample import ProcessSample
from tests.cli.monitor_samples import (
    FIRED,
    GPU,
    MIGS,
    draw,
    make_crowd,
    make_gpu,
    make_process,
    make_sample,
    make_state,
)


def take_util(state: MonitorState, *percents: float | None) -> None:
    for percent in percents:
        state.take(make_sample(gpus=(make_gpu(gpu_utilization_percent=percent),)))


# History


def test_the_history_of_a_gpu_is_kept_for_so_long_with_its_gaps() -> None:
    state = MonitorState(1.0)
    take_util(state, 5, None, *([50] * (HISTORY_LENGTH - 1)))
    history = state.history(GPU)
    assert list(history.util) == [None] + [50] * (HISTORY_LENGTH - 1)
    assert newest(history.memory, 1) == [pytest.approx(76.67, abs=0.01)]
    assert newest(history.power, 1) == [pytest.approx(91.6, abs=0.1)]


def test_a_gpu_that_comes_later_has_a_history_of_its_own() -> None:
    state = MonitorState(1.0)
    state.take(make_sample(1))
    state.take(make_sample(2))
    assert [len(state.history(make_gpu(index)).util) for index in (0, 1, 2)] == [2, 1, 0]


def test_the_newest_values_stand_at_the_right() -> None:
    assert newest([1.0, None, 3.0], 2) == [None, 3.0]
    assert newest([1.0], 3) == [None, None, 1.0]
    assert draw_history(newest([100.0, None, 0.0], 5)) == ["  █ ▁"]


def test_a_history_is_drawn_over_several_rows_from_the_top() -> None:
    assert draw_history([0, 25, 50, 75, 100, 130, None], 2) == ["   ▄██ ", "▁▄████ "]


# Pausing


def test_a_pause_stops_what_is_shown_and_nothing_else() -> None:
    state = MonitorState(1.0)
    take_util(state, 10, 20)
    assert state.press("p", 0, 0) and state.is_paused
    before = draw(state)
    take_util(state, 30, 40)
    assert state.sample is not None and state.sample.gpus[0].gpu_utilization_percent == 20
    assert draw(state) == before
    state.press("p", 0, 0)
    assert state.sample.gpus[0].gpu_utilization_percent == 40
    assert newest(state.history(GPU).util, 4) == [10, 20, 30, 40]
    assert draw(state) != before


# Alerts


def test_an_alert_begins_once_and_once_more_after_it_was_over() -> None:
    state = MonitorState(1.0)
    # What can't be told for a moment is no end.
    fired = [False, True, True, None, True, False, None, True]
    begun = [state.take(make_sample(alerts=(replace(FIRED, is_fired=is_fired),))) for is_fired in fired]
    assert begun == [False, True, False, False, False, False, False, True]


def test_an_alert_is_not_over_because_its_gpu_is_not_there() -> None:
    state = MonitorState(1.0)
    assert [state.take(make_sample(alerts=alerts)) for alerts in ((FIRED,), (), (FIRED,))] == [True, False, False]


def test_an_alert_on_another_gpu_is_another_one_and_begins_in_a_pause_too() -> None:
    state = MonitorState(1.0)
    assert state.take(make_sample(alerts=(FIRED,)))
    state.press("p", 0, 0)
    assert state.take(make_sample(alerts=(FIRED, replace(FIRED, gpu_index=1))))


# Sorting and scrolling


def test_s_goes_through_the_orders_which_are_named_and_begins_at_the_top() -> None:
    state = make_state(make_sample(gpus=(make_gpu(processes=make_crowd(20)),)))
    state.scroll = 7
    names = []
    for _ in range(6):
        names.append(next(row for row in draw(state) if "processes" in row))
        assert state.press("s", 20, 4)
        assert state.scroll == 0
    for name, words in zip(
        names, ("most memory first", "by PID", "by user", "by GPU", "by command", "most SM first"), strict=True
    ):
        assert words in name
    assert state.order is SortOrder.MEMORY


def test_each_order_sorts_and_keeps_what_is_not_told_last() -> None:
    def make(pid: int, memory: int | None, user: str | None, command: str | None) -> ProcessSample:
        return ProcessSample(pid, "compute", memory, None, user, command)

    first = make_gpu(0, processes=(make(3, 2 * GIB, "bob", "b"), make(1, None, None, None)), migs=MIGS[:1])
    second = make_gpu(1, processes=(make(2, 9 * GIB, "ana", "a"),))
    sample = make_sample(gpus=(first, second))

    def pids(order: SortOrder) -> list[int]:
        return [process.pid for _, process in list_processes(sample, order)]

    assert pids(SortOrder.MEMORY) == [2, 3, 300, 1]
    assert pids(SortOrder.PID) == [1, 2, 3, 300]
    assert pids(SortOrder.USER) == [300, 2, 3, 1]
    assert pids(SortOrder.GPU) == [3, 1, 300, 2]
    assert pids(SortOrder.COMMAND) == [2, 3, 300, 1]
    assert [device for device, _ in list_processes(sample, SortOrder.GPU)] == ["0", "0", "0/0", "1"]


@pytest.mark.parametrize(
    ("keys", "scroll"),
    [
        (["down"], 1), (["down", "down", "up"], 1), (["up"], 0), (["page_down"], 6), (["page_down"] * 9, 14),
        (["end"], 14), (["end", "up"], 13), (["end", "page_up", "page_up"], 2), (["end", "home"], 0),
        # A key pressed beyond the end is not remembered.
        (["down"] * 40 + ["up"], 13),
    ],
)  # fmt: skip
def test_scrolling_stays_within_the_processes(keys: list[str], scroll: int) -> None:
    state = MonitorState(1.0)
    for key in keys:
        state.press(key, num_processes=20, num_shown=6)
    assert state.scroll == scroll


def test_keys_that_change_nothing_say_so() -> None:
    state = MonitorState(1.0)
    assert not state.press("x", 20, 6)
    assert not state.press("up", 20, 6)
    assert not state.press("end", 3, 6)


def test_any_key_leaves_the_help_and_does_nothing_else() -> None:
    state = MonitorState(1.0)
    assert state.press("h", 0, 0) and state.shows_help
    assert state.press("p", 0, 0) and not state.shows_help and not state.is_paused


# Pieces


def test_a_line_knows_its_width_in_cells_and_is_cut_to_one() -> None:
    line = Line("ab").add("日本", "bold").add("c")
    assert (line.plain, line.width) == ("ab日本c", 7)
    cuts = [Line("ab").add("日本", "bold").add("c").clip(width).plain for width in range(8)]
    assert cuts == ["", "…", "a…", "ab…", "ab …", "ab日…", "ab日 …", "ab日本c"]


@pytest.mark.parametrize("width", range(9))
def test_cut_text_has_at_most_the_width(width: int) -> None:
    for text in ("日本語", "abcdef", ""):
        assert cell_len(clip_text(text, width)) <= width


def test_fields_of_low_priority_leave_first() -> None:
    fields = [(1, Line("middle")), (0, Line("least")), (2, Line("most"))]
    assert [join_fitting(fields, width).plain for width in (19, 18, 12, 11, 3)] == [
        "middle  least  most",
        "middle  most",
        "middle  most",
        "most",
        "mo…",
    ]


def test_parts_and_words_are_set_in_as_many_rows_as_they_need() -> None:
    assert [row.plain for row in flow_lines([Line("aa"), Line("bb"), Line("cc")], 7)] == ["aa · bb", "cc"]
    assert [row.plain for row in wrap_words("one two  three", 8)] == ["one two", "three"]


def test_a_heading_is_as_wide_as_its_place() -> None:
    assert draw_heading(Line("title"), 30, Line("note")).plain == "── title ───────────── note ──"
    assert draw_heading(Line("title"), 20, Line("a note without room")).plain == "title ──────────────"


def test_figures_in_words() -> None:
    assert format_memory(None, 24 * GIB) == "N/A of 24.0 GiB"
    assert format_memory(GIB, None) == "1.0 GiB"
    assert (format_share(None, 450, "W"), format_share(9.6, None, "W")) == ("N/A", "10 W")
    rates = [format_rate(rate) for rate in (None, 0, 999, 1536, 20 * 1024, 5.25 * 1024**2, 12.4 * GIB)]
    assert rates == ["N/A", "0 B/s", "999 B/s", "1.5 KiB/s", "20 KiB/s", "5.2 MiB/s", "12 GiB/s"]
    assert [format_size(size) for size in (None, 3 * 1024**2, 3 * GIB)] == ["N/A", "3 MiB", "3.0 GiB"]


def test_a_process_alone_is_not_sorted() -> None:
    rows = draw(make_state(make_sample(gpus=(make_gpu(processes=(make_process(1),)),))))
    assert next(row for row in rows if "processes" in row).startswith("── processes ──")
