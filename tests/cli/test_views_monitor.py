"""The monitor's screen at every size: what has to be on it, what must never be, and in which words."""

import re
from dataclasses import replace

import pytest
from rich.cells import cell_len

from dsft.cli.views.monitor.gpu import CHARTS_WIDTH, draw_gpu, draw_gpu_with_charts
from dsft.cli.views.monitor.layout import draw_screen, render_sample
from dsft.cli.views.monitor.line import Rows
from dsft.cli.views.monitor.state import MonitorState
from dsft.core.units import GIB
from dsft.monitor.alerts import judge, parse_alert
from dsft.monitor.sample import HostSample
from tests.cli.monitor_samples import (
    FIRED,
    HOST,
    LOST,
    MACHINES,
    NO_DRIVER,
    RUN,
    SILENT_GPU,
    draw,
    draw_text,
    has_style,
    make_crowd,
    make_gpu,
    make_process,
    make_sample,
    make_state,
    print_screen,
)

SIZES = [
    (1, 1), (8, 3), (20, 5), (20, 60), (29, 9), (30, 8), (37, 12), (40, 15), (45, 16), (59, 20), (60, 20), (66, 10),
    (80, 24), (100, 30), (129, 40), (130, 40), (155, 45), (200, 50), (250, 6), (320, 90),
]  # fmt: skip


# Size


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_no_row_is_wider_than_the_terminal_and_all_its_rows_are_used(machine: str, width: int, height: int) -> None:
    for shows_help in (False, True):
        state = make_state(MACHINES[machine], num_samples=3)
        state.shows_help = shows_help
        lines = draw_screen(state, width, height).lines
        assert [(line.plain, cell_len(line.plain)) for line in lines if cell_len(line.plain) > width] == []
        assert [line.width for line in lines] == [cell_len(line.plain) for line in lines]
        assert len(lines) <= height
        assert len(lines) == height
        if width >= 15 and not shows_help:
            assert "quit" in lines[-1].plain


@pytest.mark.parametrize("machine", MACHINES)
def test_every_size_in_between_fits_too(machine: str) -> None:
    state = make_state(MACHINES[machine], num_samples=2)
    for width in range(18, 132, 3):
        for height in range(4, 42, 5):
            lines = draw_screen(state, width, height).lines
            assert len(lines) == height and max(line.width for line in lines) <= width, (width, height)


def test_all_that_matters_is_on_80_by_24() -> None:
    drawn = draw(MACHINES["one"])
    text = "\n".join(drawn)
    for words in (
        "GPU 0 NVIDIA GeForce RTX 4090", " P2 ",
        "17.9 of 24.0 GiB  77 %", "97 %", "64 %", "412 of 450 W  92 %", "71 of 90 °C", "mem temp 84 °C", "fan 62 %",
        "SM 2520 of 3105 MHz", "mem clock 10501 MHz", "PCIe gen 4 ×8 of gen 4 ×16", "in 1.3 GiB/s", "out 33 MiB/s",
        "throttle ! power limit reached", "ECC 0 errors",
        "run results_deepseek · training", "deepseek-ai/deepseek-code", "PID 4000",
        "40 %  121/300  12 min 03 s left", "loss 1.0342 ↓ ", "2,331 tok/s", "peak 17.9 of 18.2 GiB predicted",
        "epoch 1.21 of 3", "validation 0.9500 (best 0.9400)",
        "processes · most memory first", "★ python -m dsft",
        "12 % 32 CPUs", "37 % 41 of 126 GiB", "45 % 812 of 1832 GiB", "25 % 2.0 of 8.0 GiB", "load 3.2",
        "disk reads 1.2 MiB/s", "writes 3.4 KiB/s",
        "q quit  p pause  s sort  ↑↓ scroll  ? keys", "every 1 s · ",
    ):  # fmt: skip
        assert words in text, words
    assert sum("━" in row and "▁" <= row[-1] <= "█" for row in drawn) == 4  # a history beside each bar but one


def test_the_essentials_are_on_40_by_15() -> None:
    text = draw_text(MACHINES["one"], 40, 15)
    for words in ("17.9/24.0 GiB  77 %", "97 %", "71 of 90 °C", "412 of 450 W", "! power limit reached",
                  "121/300  12 min 03 s left", "4000", "CPU 12 %", "q quit"):  # fmt: skip
        assert words in text, words


def test_the_least_is_on_20_by_5() -> None:
    text = draw_text(MACHINES["one"], 20, 5)
    for words in ("17.9/24.0 GiB", "97 % 71 °C 412 W", "! power limit", "121/300", "q quit"):
        assert words in text, words


def test_a_wide_terminal_has_charts_and_a_very_wide_one_two_gpus_in_a_row() -> None:
    drawn = draw(MACHINES["one"], 200, 50)
    assert any("memory, last 40 s" in row for row in drawn)
    assert any("util, last 40 s" in row for row in drawn)
    assert max(row.count("█") for row in drawn) == 40  # samples there have been
    beside = draw(MACHINES["eight"], 200, 50)
    assert sum("GPU 0 " in row and "GPU 1 " in row for row in beside) == 1
    assert sum("of 24.0 GiB" in row for row in beside) == 4
    assert draw_text(MACHINES["eight"], 200, 50).count("of 24.0 GiB") == 8


def test_many_gpus_have_a_row_each_on_a_small_terminal() -> None:
    drawn = draw(MACHINES["eight"])
    assert [row.split()[0] for row in drawn if "/24.0 GiB" in row] == list("01234567")
    text = "\n".join(drawn)
    for words in ("! power limit reac", "idle", "121/300", "more below", "host"):
        assert words in text, words


@pytest.mark.parametrize(("width", "has_bandwidth"), [(50, False), (66, False), (80, False), (100, True), (129, True)])
def test_the_columns_of_many_gpus_have_names(width: int, has_bandwidth: bool) -> None:
    header, first, *_ = draw(MACHINES["eight"], width, 20)
    columns = {"memory": "17.9/24.0 GiB", "util": "97 %", "temp": "71 °C", "power": "412/450 W"}
    assert header.startswith("GPU ") and ("bandwidth" in header) == has_bandwidth
    for name, value in (columns | ({"bandwidth": "64 %"} if has_bandwidth else {})).items():
        assert first[: header.index(name) + len(name)].endswith(value), name
    if "throttle" in header:
        assert first[header.index("throttle") :].startswith("! power")
    assert "memory " not in draw(MACHINES["one"], width, 6)[0]


def test_a_brake_has_a_row_of_its_own_where_there_is_no_room_beside() -> None:
    drawn = draw(MACHINES["four"], 50, 12)
    assert sum("/24.0 GiB" in row for row in drawn) == 4
    assert sum("! power limit reached" in row for row in drawn) == 1


def test_figures_without_measure_stay_in_their_place() -> None:
    gpu = make_gpu(memory_used_bytes=10**18, memory_total_bytes=10**19, power_w=10.0**15, power_limit_w=10.0**16)
    history = make_state(make_sample()).history(gpu)
    for width in (60, 80, 110, 130, 200):
        assert all(row.width <= width for row in draw_gpu(gpu, history, width))
        rows = draw_gpu_with_charts(gpu, history, 1.0, max(width, CHARTS_WIDTH))
        assert all(row.width <= max(width, CHARTS_WIDTH) for row in rows)


# What is told, and what is not


def test_what_is_not_told_is_not_available_and_never_zero() -> None:
    for width, height in ((80, 24), (200, 50), (50, 16), (45, 7), (20, 5)):
        silent = make_state(make_sample(gpus=(SILENT_GPU,), driver=None, host=None, runs=()), num_samples=1)
        gpu_rows = [row.partition(", last")[0] for row in draw(silent, width, height)[:-1] if "processes" not in row]
        assert any("N/A" in row for row in gpu_rows)
        figures = " ".join(gpu_rows).replace("GPU 0", "").lstrip().removeprefix("0 ")
        assert not any(character.isdigit() for character in figures), figures


def test_each_missing_figure_of_a_gpu_says_so() -> None:
    text = draw_text(MACHINES["silent"])
    for words in ("state N/A", "SM N/A", "mem clock N/A", "mem temp N/A", "PCIe N/A", "in N/A", "out N/A", "fan N/A",
                  "throttle N/A", "ECC N/A", "processes N/A", "load N/A", "disk reads N/A"):  # fmt: skip
        assert words in text, words


def test_a_value_without_its_limit_stands_alone() -> None:
    gpu = make_gpu(temperature_slowdown_c=None, power_limit_w=None, sm_clock_max_mhz=None, memory_total_bytes=None)
    text = draw_text(make_sample(gpus=(gpu,)))
    for words in (" 17.9 GiB", " 412 W", " 71 °C", "SM 2520 MHz"):
        assert words in text, words


def test_a_link_at_its_best_has_no_limit_beside_it() -> None:
    assert "PCIe gen 4 ×8 · in" in draw_text(make_sample(gpus=(make_gpu(pcie_width_max=8),)), 100, 30)


def test_brakes_stand_out_and_idleness_does_not() -> None:
    assert has_style(MACHINES["one"], "! power limit reached", "bold yellow")
    assert has_style(MACHINES["troubles"], "! too hot: hardware slows it down", "bold red")
    idle = make_sample(gpus=(make_gpu(throttle_reasons=("gpu_idle",)),))
    assert has_style(idle, "idle", "dim")
    assert "! " not in draw_text(idle)
    assert "throttle none" in draw_text(make_sample(gpus=(make_gpu(throttle_reasons=()),)))


def test_errors_of_the_memory_stand_out() -> None:
    assert has_style(MACHINES["troubles"], "! 3 uncorrected", "bold red")
    assert "! 3 uncorrected" in draw_text(MACHINES["troubles"], 60, 8)
    gpu = make_gpu(ecc_corrected_errors=5, ecc_uncorrected_errors_lifetime=2)
    assert "ECC 5 corrected (2 uncorrected ever)" in draw_text(make_sample(gpus=(gpu,)))
    assert "ECC off" in draw_text(make_sample(gpus=(make_gpu(is_ecc_enabled=False),)))
    assert "ECC N/A" in draw_text(make_sample(gpus=(make_gpu(ecc_corrected_errors=None, ecc_uncorrected_errors=None),)))


def test_a_lost_gpu_is_a_sentence_and_the_other_goes_on() -> None:
    text = draw_text(MACHINES["lost"], 80, 30)
    assert LOST.found in text and LOST.fix in text
    assert text.count("of 24.0 GiB") == 1
    assert "GPU 1 fell off the bus" in draw_text(MACHINES["lost"], 60, 8)


def test_without_a_gpu_the_sentence_is_shown_and_the_host_too() -> None:
    for width, height in ((80, 24), (40, 15)):
        text = " ".join(draw_text(MACHINES["no driver"], width, height).split())
        for words in (NO_DRIVER.found, NO_DRIVER.fix, "CPU", "121/300"):
            assert words in text, words
        assert "processes" not in text


def test_instances_are_indented_rows_with_bars() -> None:
    drawn = draw(MACHINES["mig"], 80, 30)
    rows = [row for row in drawn if row.startswith("  MIG ")]
    assert [row.split()[:3] for row in rows] == [["MIG", str(index), "1g.18gb"] for index in range(3)]
    assert all("━" in row and "of 16.0 GiB" in row for row in rows)
    assert "MIG on" in drawn[0]
    assert [row.split()[0] for row in drawn if "python job_" in row] == ["0/0", "0/1", "0/2"]


def test_the_host_can_be_left_out() -> None:
    assert "CPU" not in draw_text(MACHINES["no host"])


def test_no_swap_is_no_missing_figure() -> None:
    text = draw_text(make_sample(host=replace(HOST, swap_used_bytes=0, swap_total_bytes=0)))
    assert "swap ──────────   0 % none" in text
    assert "swap" in draw_text(make_sample(host=HostSample()))


# Processes


def test_a_runs_process_a_containers_and_one_of_others_are_told_apart() -> None:
    rows = {row.split()[1]: row for row in draw(MACHINES["one"], 120, 30) if row.startswith("  0 ")}
    assert "★ python -m dsft train" in rows["4000"]
    assert "★" not in rows["4001"] and "python 数据/训练.py --名前 テスト" in rows["4001"]
    assert "1234 (37 in 3f2a9c…)" in rows["1234"]
    assert "not visible from here (another container, or hidden)" in rows["777"] and " N/A " in rows["777"]
    assert "512 MiB" in rows["777"]


def test_a_runs_pid_that_belongs_to_someone_else_is_not_marked() -> None:
    hidden = replace(make_process(4000), is_visible=False)
    contained = replace(make_process(4000), container_pid=1)
    for process in (hidden, contained):
        assert "★" not in draw_text(make_sample(gpus=(make_gpu(processes=(process,)),)))


def test_no_process_and_processes_that_are_not_told_are_told_apart() -> None:
    assert "no process uses a GPU" in draw_text(make_sample(gpus=(make_gpu(processes=()),)))
    assert "the driver does not tell them" in draw_text(make_sample(gpus=(make_gpu(processes=None),)))


def test_what_is_out_of_sight_is_counted() -> None:
    state = make_state(MACHINES["crowd"])
    frame = draw_screen(state, 80, 24)
    assert (frame.num_processes, frame.num_shown) == (20, 4)
    assert "16 more below" in draw_text(state) and "above" not in draw_text(state)
    state.scroll = 5
    text = draw_text(state)
    assert "5 above · 11 more below" in text
    assert "5005" in text and "5004" not in text
    state.scroll = 99
    assert "16 above" in draw_text(state) and "below" not in draw_text(state)


def test_what_is_out_of_sight_is_counted_at_any_width_and_all_keys_are_there() -> None:
    state = make_state(MACHINES["crowd"])
    for scroll in (0, 5):
        state.scroll = scroll
        for width in range(20, 80):
            drawn = draw(state, width, 15)
            num_shown = sum(re.search(r"\b50[01]\d\b", row) is not None for row in drawn)
            heading = next(row for row in drawn if row.startswith(("── processes", "processes", "+", "-")))
            assert f"+{20 - scroll - num_shown}" in heading or f"{20 - scroll - num_shown} more below" in heading
            assert f"-{scroll}" in heading or f"{scroll} above" in heading or not scroll
    for width in range(36, 80):
        keys = draw(state, width, 15)[-1].replace("quit", "").split()
        assert {"q", "p", "s", "↑↓", "?"} <= set(keys), keys
    assert draw(state, 28, 15)[-1].startswith("q quit  p  s  ?  ")
    assert draw(state, 20, 15)[-1].startswith("q quit  ?  ")


# Edges


def test_an_alert_that_fires_is_a_banner_in_words() -> None:
    sample = make_sample(alerts=(FIRED, replace(FIRED, alert="temp>85", metric="temp", is_fired=False)))
    first = draw_screen(make_state(sample), 80, 24).lines[0]
    assert first.plain.strip() == "ALERT  GPU 0: vram is 76.6 % (alert vram>70)"
    assert {style for _, style in first.parts} == {"bold reverse red"} and first.width == 80
    assert "ALERT" not in draw_text(make_sample(alerts=(replace(FIRED, is_fired=None),)))


def test_many_alerts_leave_room_for_the_rest() -> None:
    assert draw_text(MACHINES["alerts"]).count("ALERT") == 2 and "and 4 more" in draw_text(MACHINES["alerts"])
    small = draw(MACHINES["alerts"], 40, 6)
    assert small[0].strip().startswith("ALERT (and 5 more)")


def test_a_banner_comes_and_goes_in_a_pause_while_the_figures_stand_still() -> None:
    state = make_state(make_sample())
    state.press("p", 0, 0)
    state.take(make_sample(gpus=(make_gpu(temperature_c=85),), alerts=(FIRED,)))
    text = draw_text(state)
    assert text.startswith(" ALERT  GPU 0: vram is 76.6 %") and "71 of 90" in text
    state.take(make_sample(gpus=(make_gpu(temperature_c=86),), alerts=(replace(FIRED, is_fired=False),)))
    assert "ALERT" not in draw_text(state)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 30), (200, 50)])
def test_bars_and_banner_tell_the_same_share(width: int, height: int) -> None:
    gpu = make_gpu(memory_used_bytes=10 * GIB, memory_free_bytes=12 * GIB)  # the driver has the rest
    sample = make_sample(gpus=(gpu,), runs=())
    alerts = judge(map(parse_alert, ("vram>0", "ram>0", "disk>0", "swap>0")), sample)
    text = draw_text(replace(sample, alerts=alerts[1:]), width, height)
    shares = {alert.metric: alert.value for alert in alerts}
    assert shares["vram"] == 50 and shares["disk"] == pytest.approx(100 * 812 / 1812, abs=0.05)
    for value in shares.values():
        assert value is not None
        # A banner tells tenths, a bar none: what was rounded once is not rounded again here.
        assert any(f" {value + rounded:.0f} %" in text for rounded in (-0.05, 0.05))


def test_the_footer_says_what_stands_still_and_how_to_leave() -> None:
    state = make_state(MACHINES["one"])
    state.press("p", 0, 0)
    assert draw(state)[-1].startswith(" paused   q quit")
    keyless = MonitorState(0.5, has_keys=False)
    keyless.take(MACHINES["one"])
    assert draw(keyless)[-1].startswith("Ctrl-C quits") and "every 0.5 s" in draw(keyless)[-1]


def test_help_tells_each_key_and_what_goes_on_in_a_pause() -> None:
    state = make_state(MACHINES["one"])
    state.press("?", 0, 0)
    text = " ".join(draw_text(state).split())
    for words in ("q, Esc quit", "history, alerts and a CSV file go on", "PgUp", "Home and End", "fg"):
        assert words in text, words


# Terminals


def test_without_unicode_the_screen_is_ascii_of_the_same_width() -> None:
    for machine in ("one", "wide", "mig", "alerts"):
        drawn = print_screen(MACHINES[machine], 80, 30, encoding="ascii").split("\n")
        assert all(line.isascii() for line in drawn)
        unicode = print_screen(MACHINES[machine], 80, 30).split("\n")
        assert [len(line) for line in drawn] == [cell_len(line) for line in unicode]
    assert "77 %" in "\n".join(drawn) and "===" in "\n".join(drawn)


def test_without_colour_the_words_are_the_same() -> None:
    sent = print_screen(MACHINES["troubles"], 80, 24, force_terminal=True, color_system="256", no_color=True)
    assert "\x1b[31m" not in sent and "\x1b[33m" not in sent
    assert "too hot: hardware slows it down" in sent


def test_names_from_outside_can_neither_move_the_cursor_nor_turn_the_line() -> None:
    evil = "a\x1b[2Jb\nc\u202ed\udcff\te"
    process = replace(make_process(1), command=evil, user=evil, container_pid=2, container_id=evil)
    sample = make_sample(
        gpus=(make_gpu(name=evil, processes=(process,)),), runs=(replace(RUN, run_name=evil, model_name=evil),)
    )
    for width, height in ((120, 30), (60, 8)):
        for row in draw(sample, width, height):
            assert row.isprintable(), row


def test_a_sample_by_itself_shows_all_processes_and_no_keys() -> None:
    rows = render_sample(replace(MACHINES["crowd"], gpus=(make_gpu(processes=make_crowd(30)),)), 100)
    assert isinstance(rows, Rows)
    text = "\n".join(line.plain for line in rows.lines)
    assert text.count("python job_") == 30
    assert not any(character in "▁▂▃▄▅▆▇█" for row in rows.lines if "━" in row.plain for character in row.plain)
    assert max(row.plain.count("━") for row in rows.lines) > 48
    assert "quit" not in text and "17.9 of 24.0 GiB" in text and "32 CPUs" in text
