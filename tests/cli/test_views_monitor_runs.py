"""Training runs on the monitor's screen: those that go on, those that are silent, and those that have ended."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dsft.core.units import GIB
from dsft.monitor.sample import RunSample
from tests.cli.monitor_samples import HOST, MACHINES, RUN, draw, draw_text, has_style, make_sample

SILENT = replace(RUN, is_overdue=True, last_event_age_s=65.0, eta_s=None, tok_per_s=None)
ENDED = replace(SILENT, is_overdue=False, last_event_age_s=None, run_name="early", event_log="/e/events.jsonl")


@pytest.fixture(autouse=True)
def _in_kolkata(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the clock on the wall be five and a half hours before UTC's."""
    monkeypatch.setenv("TZ", "IST-5:30")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def end(outcome: str, **values: object) -> RunSample:
    """Return a run that has ended."""
    base = {"outcome": outcome, "ended": "2026-01-02T01:00:00.000+00:00"}
    return replace(ENDED, **(base | values))  # type: ignore[arg-type]


def test_a_run_before_its_first_step_and_one_on_a_cpu() -> None:
    loading = replace(RUN, stage="loading", step=None, loss=None, eta_s=None, peak_memory_bytes=None)
    text = draw_text(make_sample(runs=(loading,)))
    assert "results_deepseek · loading" in text and "18.2 GiB predicted" in text and "121" not in text
    on_cpu = replace(RUN, predicted_memory_bytes=None, peak_memory_bytes=None)
    assert "peak" not in draw_text(make_sample(runs=(on_cpu,)))


@pytest.mark.parametrize(("change", "arrow"), [(-0.01, "↓"), (0.01, "↑"), (0.0, "→")])
def test_the_trend_of_the_loss_is_an_arrow(change: float, arrow: str) -> None:
    run = replace(RUN, recent_losses=tuple(1.0 + change * step for step in range(40)))
    assert f"loss 1.0342 {arrow} " in draw_text(make_sample(runs=(run,)))


def test_more_memory_than_predicted_stands_out() -> None:
    run = replace(RUN, peak_memory_bytes=19 * GIB)
    assert has_style(make_sample(runs=(run,)), "19.0 of 18.2 GiB predicted", "yellow")
    assert not has_style(MACHINES["one"], "17.9 of 18.2 GiB predicted", "yellow")


def test_the_last_step_alone_is_a_hundred_percent() -> None:
    nearly = replace(RUN, step=2999, num_steps=3000)
    assert " 99 %  2999/3000" in draw_text(make_sample(runs=(nearly,)))
    assert "100 %  3000/3000" in draw_text(make_sample(runs=(replace(nearly, step=3000),)))


@pytest.mark.parametrize(("width", "height"), [(200, 50), (130, 40), (80, 24), (60, 30), (60, 8)])
def test_an_overdue_run_says_for_how_long_it_has_been_silent(width: int, height: int) -> None:
    text = draw_text(make_sample(runs=(SILENT,)), width, height)
    assert "silent for 1 min 05 s" in text
    assert " left" not in text and "tok/s" not in text
    assert has_style(make_sample(runs=(SILENT,)), "silent for 1 min 05 s", "bold yellow")
    assert "silent" not in draw_text(make_sample(runs=(replace(RUN, last_event_age_s=65.0),)), width, height)


def test_the_title_of_an_overdue_run_has_its_stage_where_there_is_room() -> None:
    assert "run results_deepseek · training · silent for 1 min 05 s ─" in draw_text(make_sample(runs=(SILENT,)))
    assert "run results_deep… · silent for 1 min 05 s" in draw_text(make_sample(runs=(SILENT,)), 44, 40)


def test_the_pid_is_the_last_that_leaves_a_heading() -> None:
    (heading,) = (row for row in draw(make_sample(runs=(SILENT,)), 80, 40) if "silent" in row)
    assert heading.endswith("─ PID 4000 ──") and "deepseek-ai" not in heading
    (heading,) = (row for row in draw(make_sample(runs=(SILENT,)), 120, 40) if "silent" in row)
    assert heading.endswith(" deepseek-ai/deepseek-coder-6.7b-base · PID 4000 ──")


def test_a_bar_keeps_its_length_whatever_stands_beside_it() -> None:
    times = (None, 8.7, 54.0, 723.0, 3599.0, 86_000.0)
    rows = [row for eta_s in times for row in draw(make_sample(runs=(replace(RUN, eta_s=eta_s, step=9),)))]
    bars = [row.split("%")[0] for row in rows if "9/300" in row]
    assert len(bars) == len(times) and len(set(bars)) == 1
    first = draw(make_sample(runs=(replace(RUN, step=111),)))
    assert len({len(row.split("/300")[0]) for row in (*rows, *first) if "/300" in row}) == 1


def test_the_mean_of_the_trend_and_the_device_are_shown_where_they_take_no_further_row() -> None:
    run = replace(RUN, device="A small card")
    for width in (80, 110, 200):
        text = draw_text(make_sample(runs=(run,)), width, 50)
        assert "mean of 10: 1.1150" in text and "A small card" in text, width
    assert " · A small card · PID 4000 ─" in draw_text(make_sample(runs=(run,)), 130, 50)
    narrow = draw_text(make_sample(runs=(run,)), 40, 50)
    assert "A small card" not in narrow
    assert "mean of" not in draw_text(make_sample(runs=(replace(run, recent_losses=(3.0, 2.0)),)), 200, 50)


@pytest.mark.parametrize(
    ("outcome", "words", "style"),
    [
        ("finished", "finished", "green"),
        ("stopped", "stopped", "yellow"),
        ("failed", "failed", "red"),
        ("killed", "killed", "red"),
        ("unknown", "ended", "dim"),
    ],
)
def test_an_ended_run_has_one_row_below_those_that_go_on(outcome: str, words: str, style: str) -> None:
    sample = make_sample(runs=(RUN, end(outcome, step=300, loss=0.05)))
    rows = draw(sample, 80, 40)
    row = f"run early · {words} · 06:30 · step 300/300 · loss 0.0500"
    assert rows.index(row) > next(index for index, text in enumerate(rows) if text.startswith("── run results"))
    assert sum("early" in text for text in rows) == 1
    assert has_style(sample, words, style, 80, 40)


def test_a_run_that_ended_while_it_loaded_says_so() -> None:
    run = end("unknown", stage="loading", step=None, num_steps=None, loss=None)
    assert "run early · ended while loading · 06:30" in draw(make_sample(runs=(run,)), 80, 40)


def test_ended_runs_are_the_first_to_go_where_there_is_no_room() -> None:
    ended = tuple(end("killed", run_name=f"early {number}") for number in range(3))
    for width in (40, 80, 120):
        seen = set()
        for height in range(5, 60):
            without = draw(make_sample(runs=(RUN,)), width, height)
            rows = draw(make_sample(runs=(RUN, *ended)), width, height)
            assert [row for row in rows if row and "early" not in row] == [row for row in without if row]
            seen.add(sum("early" in row for row in rows))
        assert seen == {0, 1, 2, 3}, width


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    logs = ("/home/a/one/results/events.jsonl", "/home/a/two/results/events.jsonl", "/x/other/events.jsonl")
    runs = tuple(replace(RUN, run_name="trained", event_log=log) for log in logs)
    runs += (replace(RUN, run_name="alone"), end("stopped", run_name="trained", event_log="/x/last/events.jsonl"))
    text = draw_text(make_sample(runs=runs, host=HOST), 100, 70)
    for name in ("one/results", "two/results"):
        assert f"run trained ({name}) · training" in text
    assert "run trained (x/other) · training" in text or "run trained (other) · training" in text
    assert "run trained (last) · stopped" in text or "run trained (x/last) · stopped" in text
    assert "run alone · training" in text
    brief = draw_text(make_sample(runs=runs[:2]), 80, 16)
    assert "(one/results)" in brief and "(two/results)" in brief
    numbered = tuple(replace(RUN, event_log=f"/x/a_long_name_of_a_folder_{number}/events.jsonl") for number in (1, 2))
    for width, height in ((80, 16), (40, 40)):
        text = draw_text(make_sample(runs=numbered), width, height)
        assert "_folder_1)" in text and "_folder_2)" in text
