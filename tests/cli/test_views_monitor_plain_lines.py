"""A sample as plain lines, and an alert as a sentence."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dsft.cli.views.monitor.plain_lines import describe_alert, format_sample
from dsft.core.units import GIB
from dsft.monitor.sample import AlertSample, GpuSample, HostSample, ProcessSample, RunSample
from tests.monitor_readers import GPU, HOST, NO_DRIVER, make_gpu, make_lost_gpu, make_mig, make_sample

RUN = RunSample(pid=7, run_name="trained", started="2026-01-02T03:00:00+00:00", event_log="/x", stage="loading")


@pytest.fixture(autouse=True)
def _in_kolkata(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the clock on the wall be five and a half hours before UTC's."""
    monkeypatch.setenv("TZ", "IST-5:30")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_each_gpu_run_and_the_host_have_a_line_with_the_time_on_the_wall() -> None:
    run = replace(RUN, stage="training", step=12, num_steps=400, loss=0.51234, tok_per_s=3321.4, eta_s=3900.0)
    lines = list(format_sample(make_sample(GPU, make_gpu(1), runs=(run,), host=HOST)))
    assert lines == [
        "08:34:05 GPU 0: memory 10.0 of 24.0 GiB · util 90 % · bandwidth 40 % · temp 61 °C · power 280 of 350 W · "
        "SM 1995 MHz · 0 processes",
        "08:34:05 GPU 1: memory 10.0 of 24.0 GiB · util 90 % · bandwidth 40 % · temp 61 °C · power 280 of 350 W · "
        "SM 1995 MHz · 0 processes",
        "08:34:05 run trained: training · step 12/400 · loss 0.5123 · 3,321 tok/s · 1 h 05 min left",
        "08:34:05 host: CPU 25 % · RAM 4.0 of 16.0 GiB · swap 0.0 of 0.0 GiB · disk 30.0 of 40.0 GiB",
    ]


def test_what_is_not_told_is_na_never_0_and_processes_that_are_not_told_are_left_out() -> None:
    silent = GpuSample(0, None, None)
    gpu, host = format_sample(make_sample(silent, host=HostSample()))
    assert gpu == ("08:34:05 GPU 0: memory N/A · util N/A · bandwidth N/A · temp N/A · power N/A · SM N/A")
    assert host.count("N/A") == 4
    assert "0" not in host.removeprefix("08:34:05")


@pytest.mark.parametrize(("num_processes", "words"), [(1, "1 process"), (2, "2 processes")])
def test_throttling_is_told_in_words_and_processes_are_counted(num_processes: int, words: str) -> None:
    processes = tuple(ProcessSample(pid, "compute", GIB) for pid in range(num_processes))
    gpu = make_gpu(throttle_reasons=("sw_power_cap", "hw_thermal_slowdown"), processes=processes)
    (line,) = format_sample(make_sample(gpu))
    assert line.endswith(f" · SM 1995 MHz · too hot: hardware slows it down, power limit reached · {words}")


def test_a_lost_gpu_and_a_missing_driver_are_told_instead() -> None:
    assert list(format_sample(make_sample(make_lost_gpu(1)))) == ["08:34:05 GPU 1: GPU 1 is lost."]
    assert list(format_sample(make_sample(problem=NO_DRIVER))) == ["08:34:05 There is no driver."]


def test_each_instance_of_a_card_with_mig_has_a_line() -> None:
    part = replace(make_mig(3, 4, 10), memory_used_bytes=6 * GIB)
    _, line = format_sample(make_sample(make_gpu(is_mig_enabled=True, migs=(part,))))
    assert line == "08:34:05 GPU 0 MIG 3: memory 6.0 of 10.0 GiB · 0 processes"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "loading"),
        ({"stage": "training", "step": 3}, "training · step 3"),
        ({"peak_memory_bytes": 18 * GIB}, "loading · peak 18.0 GiB"),
        (
            {"peak_memory_bytes": 18 * GIB, "predicted_memory_bytes": 19 * GIB},
            "loading · peak 18.0 of 19.0 GiB predicted",
        ),
    ],
)
def test_a_run_tells_what_it_knows_so_far(values: dict[str, int], words: str) -> None:
    (line,) = format_sample(make_sample(runs=(replace(RUN, **values),)))
    assert line == f"08:34:05 run trained: {words}"


def test_an_overdue_run_is_silent() -> None:
    run = replace(RUN, stage="training", step=3, is_overdue=True, last_event_age_s=65.0)
    (line,) = format_sample(make_sample(runs=(run,)))
    assert line == "08:34:05 run trained: training · silent for 1 min 05 s · step 3"


def test_an_end_is_told_once() -> None:
    other = replace(RUN, started="2026-01-02T03:01:00+00:00")
    run = replace(RUN, outcome="finished", step=408, num_steps=408, loss=0.05, peak_memory_bytes=GIB)
    told: set[str] = set()
    (line,) = format_sample(make_sample(runs=(run,)), told)
    assert line == "08:34:05 run trained: finished · step 408/408 · loss 0.0500"
    assert list(format_sample(make_sample(runs=(run,)), told)) == []
    killed = replace(other, outcome="killed", event_log="/y/x")
    lines = list(format_sample(make_sample(runs=(killed, run)), told))
    assert lines == ["08:34:05 run trained (y): killed"]


def test_runs_of_one_name_have_their_folders_behind_it() -> None:
    runs = tuple(replace(RUN, event_log=f"/{folder}/events.jsonl") for folder in ("a/out", "b/out", "out/b"))
    lines = [line.removeprefix("08:34:05 ") for line in format_sample(make_sample(runs=runs))]
    assert lines == [f"run trained ({folder}): loading" for folder in ("a/out", "b/out", "b")]


def test_a_run_s_name_can_t_break_its_line_or_move_the_cursor() -> None:
    (line,) = format_sample(make_sample(runs=(replace(RUN, run_name="a\n\x1b[2Jb"),)))
    assert line == "08:34:05 run a  [2Jb: loading"


@pytest.mark.parametrize(
    ("alert", "sentence"),
    [
        (AlertSample("vram>95", "vram", "%", 0, 97.2345, True), "GPU 0: vram is 97.23 % (alert vram>95)"),
        (AlertSample("vram>95", "vram", "%", 0, 95.04, True), "GPU 0: vram is 95.04 % (alert vram>95)"),
        (AlertSample("temp>85", "temp", "°C", 3, 90.0, True), "GPU 3: temp is 90 °C (alert temp>85)"),
        (AlertSample("ecc>0", "ecc", "errors", 1, 123456, True), "GPU 1: ecc is 123456 errors (alert ecc>0)"),
        (AlertSample("cpu>90", "cpu", "%", None, 0.0, False), "host: cpu is 0 % (alert cpu>90)"),
        (
            AlertSample("fan>9", "fan", "%", 2, None, None),
            "GPU 2: fan is not told, so the alert fan>9 can't be judged",
        ),
    ],
)
def test_an_alert_says_where_what_and_against_which_limit(alert: AlertSample, sentence: str) -> None:
    assert describe_alert(alert) == sentence
