"""`dsft monitor` at the command line: what it writes where and how it ends, with readers that say what a test wants."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dsft.cli.app import main
from dsft.cli.monitor_records import AlertTeller
from dsft.cli.output import Output
from dsft.core.units import GIB
from dsft.monitor.alerts import METRICS
from dsft.monitor.config import MonitorConfig
from dsft.monitor.run import watch
from dsft.monitor.sample import AlertSample, GpuSample, HostSample, MigSample, Problem, Sample
from dsft.monitor.sampler import Sampler
from dsft.monitor.wait_free import wait_free
from tests.monitor_readers import (
    GPU,
    LOST,
    NO_DRIVER,
    FakeClock,
    ScriptedGpus,
    ScriptedHost,
    ScriptedRuns,
    make_gpu,
    make_lost_gpu,
    make_sample,
)

Capture = pytest.CaptureFixture[str]

HOT = make_gpu(temperature_c=90.0)
AT_ONCE = ("--interval", "0.1", "--duration")


class Machine:
    """What the readers of a test say.

    Attributes:
        readings: Of the GPUs, one for each look, the last one for ever.
        configs: What was asked for.
    """

    def __init__(self) -> None:
        self.readings: list[list[GpuSample] | Problem] = [[GPU]]
        self.configs: list[MonitorConfig] = []

    def open_sampler(self, config: MonitorConfig) -> Sampler:
        self.configs.append(config)
        return Sampler(config, self.open_gpus(), ScriptedHost() if config.reads_host else None, ScriptedRuns())

    def open_gpus(self, selection: tuple[str, ...] = ()) -> ScriptedGpus:
        return ScriptedGpus(*self.readings)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    machine = Machine()
    monkeypatch.setattr("dsft.monitor.run.open_sampler", machine.open_sampler)
    monkeypatch.setattr("dsft.cli.monitor_wait.NvmlGpus", machine.open_gpus)
    clock = FakeClock()
    for function in (watch, wait_free):
        monkeypatch.setattr(function, "__kwdefaults__", {"clock": clock, "sleep": clock.sleep})
    monkeypatch.chdir(tmp_path)
    return machine


class Ended:
    """How a command ended, and what it had written."""

    def __init__(self, capsys: Capture, *args: str) -> None:
        self.code = main(["monitor", *args])
        captured = capsys.readouterr()
        self.out = captured.out
        self.error_lines = [
            re.sub(r"^(alert|alert over): \d\d:\d\d:\d\d ", r"\1: TIME ", line) for line in captured.err.splitlines()
        ]

    @property
    def records(self) -> list[dict[str, Any]]:
        assert self.out == "" or self.out.endswith("\n")
        return [json.loads(line, parse_constant=pytest.fail) for line in self.out.splitlines()]


def test_once_is_one_json_object_with_the_fields_of_a_sample(machine: Machine, capsys: Capture) -> None:
    ended = Ended(capsys, "--once", "--json")
    assert (ended.code, ended.error_lines) == (0, [])
    (record,) = ended.records
    assert list(record) == ["event", *(field.name for field in fields(Sample))]
    assert (record["event"], record["problem"], record["alerts"]) == ("Sample", None, [])
    assert list(record["gpus"][0]) == [field.name for field in fields(GpuSample)]
    assert record["gpus"][0]["memory_used_bytes"] == 10 * GIB
    assert record["gpus"][0]["fan_percent"] is None
    assert list(record["host"]) == [field.name for field in fields(HostSample)]


def test_a_duration_has_an_object_for_each_sample(machine: Machine, capsys: Capture) -> None:
    ended = Ended(capsys, "--json", *AT_ONCE, "0.3")
    assert (ended.code, ended.error_lines) == (0, [])
    assert len(ended.records) == 3


def test_values_that_are_no_number_are_null(machine: Machine, capsys: Capture) -> None:
    machine.readings = [[make_gpu(power_w=float("nan"), temperature_c=float("inf"))]]
    (record,) = Ended(capsys, "--once", "--json").records
    assert (record["gpus"][0]["power_w"], record["gpus"][0]["temperature_c"]) == (None, None)


@pytest.mark.parametrize("mode", [("--json",), ("--quiet",), ("--json", "--no-cpu")])
@pytest.mark.parametrize("time", [("--once",), (*AT_ONCE, "0.05")])
def test_without_a_driver_the_code_is_5_and_the_host_is_told_all_the_same(
    machine: Machine, capsys: Capture, mode: tuple[str, ...], time: tuple[str, ...]
) -> None:
    machine.readings = [NO_DRIVER]
    ended = Ended(capsys, *time, *mode)
    assert ended.code == 5
    assert ended.error_lines[-2:] == [f"error: {NO_DRIVER.found}", f"hint: {NO_DRIVER.fix}"]
    if mode == ("--quiet",):
        assert ended.out == ""
        return
    (record,) = ended.records
    assert record["problem"] == {"kind": "no_driver", "found": NO_DRIVER.found, "fix": NO_DRIVER.fix}
    assert (record["gpus"], record["driver"]) == ([], None)
    assert (record["host"] is None) == ("--no-cpu" in mode)


def test_a_lost_gpu_beside_another_ends_with_5_too(machine: Machine, capsys: Capture) -> None:
    machine.readings = [[GPU, make_lost_gpu(1)]]
    ended = Ended(capsys, "--once", "--json")
    assert ended.code == 5
    assert ended.error_lines == [f"error: {LOST.found}", f"hint: {LOST.fix}"]
    (record,) = ended.records
    assert record["problem"] is None
    assert record["gpus"][0]["memory_used_bytes"] == 10 * GIB
    assert record["gpus"][1]["problem"]["kind"] == "gpu_lost"
    assert record["gpus"][1]["memory_used_bytes"] is None


def test_a_gpu_that_was_lost_for_a_while_and_came_back_is_no_error(machine: Machine, capsys: Capture) -> None:
    machine.readings = [[make_lost_gpu(0)], [GPU]]
    assert Ended(capsys, "--json", *AT_ONCE, "0.2").code == 0


@pytest.mark.parametrize("readings", [[[GPU], [make_lost_gpu(0)]], [[GPU], NO_DRIVER]])
def test_a_gpu_that_is_lost_at_the_end_is_an_error(machine: Machine, capsys: Capture, readings: Any) -> None:
    machine.readings = readings
    ended = Ended(capsys, "--json", *AT_ONCE, "0.2")
    assert (ended.code, len(ended.records), len(ended.error_lines)) == (5, 2, 2)


def test_a_quiet_watch_tells_each_time_that_a_gpu_begins_to_be_lost(machine: Machine, capsys: Capture) -> None:
    lost = [make_lost_gpu(0)]
    machine.readings = [[GPU], lost, lost, [GPU], lost, [GPU]]
    ended = Ended(capsys, "--quiet", *AT_ONCE, "0.6")
    assert (ended.code, ended.out) == (0, "")
    assert ended.error_lines == [f"warning: {LOST.found}"] * 2


@pytest.mark.parametrize("mode", ["--json", "--quiet"])
def test_a_limit_that_is_passed_is_told_and_ends_once_with_4(machine: Machine, capsys: Capture, mode: str) -> None:
    machine.readings = [[HOT, make_gpu(1)]]
    ended = Ended(capsys, "--once", mode, "--alert", "temp>85", "--alert", "TEMP > 85", "--alert", "cpu>99")
    assert ended.code == 4
    assert ended.error_lines == ["alert: TIME GPU 0: temp is 90 °C (alert temp>85)"]
    if mode == "--json":
        (record,) = ended.records
        assert [(alert["gpu_index"], alert["is_fired"]) for alert in record["alerts"]] == [
            (0, True),
            (1, False),
            (None, False),
        ]


def test_limits_that_are_not_passed_end_with_0(machine: Machine, capsys: Capture) -> None:
    ended = Ended(capsys, "--once", "--quiet", "--alert", "temp>85", "--alert", "cpu>90", "--alert", "free<5")
    assert (ended.code, ended.out, ended.error_lines) == (0, "", [])


def test_an_alert_is_told_once_at_its_edge_and_again_when_it_is_over(machine: Machine, capsys: Capture) -> None:
    machine.readings = [[GPU], [HOT], [HOT], [GPU], [GPU], [HOT], [GPU]]
    ended = Ended(capsys, "--json", "--alert", "temp>85", *AT_ONCE, "0.7")
    begun, over = (
        "alert: TIME GPU 0: temp is 90 °C (alert temp>85)",
        "alert over: TIME GPU 0: temp is 61 °C (alert temp>85)",
    )
    assert ended.error_lines == [begun, over, begun, over]
    assert ended.code == 4  # it had fired, though it no longer does
    assert [record["alerts"][0]["is_fired"] for record in ended.records] == [
        temperature_c > 85 for temperature_c in (61, 90, 90, 61, 61, 90, 61)
    ]


def test_alerts_of_several_gpus_and_limits_are_told_apart(machine: Machine, capsys: Capture) -> None:
    machine.readings = [[HOT, make_gpu(1)], [HOT, make_gpu(1, temperature_c=95.0)]]
    ended = Ended(capsys, "--quiet", "--alert", "temp>85", "--alert", "temp>89", *AT_ONCE, "0.2")
    assert ended.error_lines == [
        "alert: TIME GPU 0: temp is 90 °C (alert temp>85)",
        "alert: TIME GPU 0: temp is 90 °C (alert temp>89)",
        "alert: TIME GPU 1: temp is 95 °C (alert temp>85)",
        "alert: TIME GPU 1: temp is 95 °C (alert temp>89)",
    ]


@pytest.mark.parametrize("gone", [NO_DRIVER, [make_lost_gpu(0)]])
def test_an_alert_is_not_over_because_its_gpu_is_lost(machine: Machine, capsys: Capture, gone: Any) -> None:
    machine.readings = [[HOT], gone, [HOT], [GPU]]
    ended = Ended(capsys, "--json", "--alert", "temp>85", *AT_ONCE, "0.4")
    assert [line.partition(":")[0] for line in ended.error_lines] == ["alert", "alert over"]


@pytest.mark.parametrize("time", [("--once",), (*AT_ONCE, "0.05")])
def test_a_limit_that_can_t_be_judged_is_a_failure_not_silence(
    machine: Machine, capsys: Capture, time: tuple[str, ...]
) -> None:
    ended = Ended(capsys, *time, "--json", "--alert", "fan>50", "--alert", "temp>85")
    assert ended.code == 1
    error, hint = ended.error_lines
    assert error == "error: The alert fan>50 can't be judged: GPU 0 does not tell it."
    assert hint.startswith("hint: ")
    (record,) = ended.records
    assert [alert["is_fired"] for alert in record["alerts"]] == [None, False]


def test_a_limit_of_the_host_that_is_left_out_is_refused(machine: Machine, capsys: Capture) -> None:
    ended = Ended(capsys, "--once", "--quiet", "--no-cpu", "--alert", "ram>5")
    assert ended.code == 2
    assert ended.error_lines[0] == "error: --alert 'ram>5' is about the host, and --no-cpu leaves the host out."


def test_a_limit_that_is_passed_is_graver_than_one_that_can_t_be_judged_and_a_lost_gpu_than_both(
    machine: Machine, capsys: Capture
) -> None:
    machine.readings = [[HOT]]
    assert Ended(capsys, "--once", "--quiet", "--alert", "temp>85", "--alert", "fan>50").code == 4
    machine.readings = [[HOT, make_lost_gpu(1)]]
    ended = Ended(capsys, "--once", "--quiet", "--alert", "temp>85")
    assert ended.code == 5
    assert [line.partition(":")[0] for line in ended.error_lines] == ["alert", "error", "hint"]


def test_a_watch_warns_once_of_a_limit_that_it_can_t_judge(machine: Machine, capsys: Capture) -> None:
    ended = Ended(capsys, "--quiet", "--alert", "fan>50", *AT_ONCE, "0.4")
    assert ended.code == 1
    assert ended.error_lines[:-2] == ["warning: GPU 0: fan is not told, so the alert fan>50 can't be judged"]


def test_the_first_look_at_a_cpu_is_no_reason_to_warn(capsys: Capture) -> None:
    teller = AlertTeller(Output(is_quiet=True), is_silent=False)
    for value in (None, 5.0, None, 5.0):
        is_fired = None if value is None else False
        teller.take(make_sample(alerts=(AlertSample("cpu>9", "cpu", "%", None, value, is_fired),)))
    assert capsys.readouterr().err == ""
    assert not teller.has_fired


def test_what_the_screen_shows_itself_is_only_remembered(capsys: Capture) -> None:
    teller = AlertTeller(Output(), is_silent=True)
    teller.take(make_sample(alerts=(AlertSample("cpu>9", "cpu", "%", None, 10.0, True),)))
    teller.take(make_sample())
    assert teller.has_fired
    assert capsys.readouterr().err == ""


def test_what_the_screen_has_shown_is_told_afterwards_once_with_the_time_it_began(capsys: Capture) -> None:
    teller = AlertTeller(Output(), is_silent=True)
    for second, value in enumerate((5.0, 10.0, 5.0, 11.0)):
        alerts = [AlertSample("vram>9", "vram", "%", 0, value, value > 9, mig) for mig in (None, 2)]
        alerts.append(AlertSample("cpu>90", "cpu", "%", None, value, False))
        teller.take(replace(make_sample(alerts=tuple(alerts)), time=f"2026-01-02T00:00:0{second}+00:00"))
    teller.tell_untold()
    teller.tell_untold()
    begun = datetime.fromisoformat("2026-01-02T00:00:01+00:00").astimezone()
    assert capsys.readouterr().err.splitlines() == [
        f"alert: {begun:%H:%M:%S} GPU 0: vram is 10 % (alert vram>9)",
        f"alert: {begun:%H:%M:%S} GPU 0 MIG 2: vram is 10 % (alert vram>9)",
    ]


def test_lines_tell_a_problem_when_it_begins_and_ends_and_the_host_goes_on(machine: Machine, capsys: Capture) -> None:
    lost = [GPU, make_lost_gpu(1)]
    machine.readings = [NO_DRIVER, NO_DRIVER, lost, lost, NO_DRIVER, lost, [GPU, make_gpu(1)]]
    ended = Ended(capsys, *AT_ONCE, "0.7")
    lines = [line.partition(" ")[2] for line in ended.out.splitlines()]
    assert sum(line.startswith("host: ") for line in lines) == 7
    assert [line for line in lines if not line.startswith("host: ") and "memory" not in line] == [
        NO_DRIVER.found,
        f"GPU 1: {LOST.found}",
        "GPUs can be read again",
        NO_DRIVER.found,
        "GPUs can be read again",
        "GPU 1 can be read again",
    ]


def test_waiting_names_the_mig_instance_that_has_room(machine: Machine, capsys: Capture) -> None:
    parts = tuple(MigSample(index, f"MIG-{index}", None, 0, 0, index * GIB, 16 * GIB) for index in (1, 5))
    machine.readings = [[make_gpu(1, is_mig_enabled=True, migs=parts)]]
    ended = Ended(capsys, "--wait-free", "4")
    assert (ended.code, ended.out, ended.error_lines) == (0, "MIG-5\n", ["GPU 1 MIG 5 has 5.0 GiB free."])


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_rows_go_to_stdout_in_place_of_lines(machine: Machine, capsys: Capture, name: str) -> None:
    machine.readings = [[GPU, make_gpu(1)]]
    for mode in ((), ("--quiet",)):
        ended = Ended(capsys, "--csv", name, *mode, *AT_ONCE, "0.2")
        assert (ended.code, ended.error_lines) == (0, [])
        rows = list(csv.DictReader(io.StringIO(ended.out), strict=True))
        assert [(row["gpu_index"], row["host_num_cpus"]) for row in rows] == [("0", "8"), ("1", "8")] * 2
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--csv", "-", "--json"), "--csv - and --json both write to stdout."),
        (("--csv", "/dev/stdout", "--json"), "--csv /dev/stdout and --json both write to stdout."),
        (("--csv", ""), "--csv has no file name."),
    ],
)
def test_rows_that_have_no_place_are_refused(
    machine: Machine, capsys: Capture, args: tuple[str, ...], words: str
) -> None:
    ended = Ended(capsys, *args, *AT_ONCE, "0.2")
    assert (ended.code, ended.error_lines[0]) == (2, f"error: {words}")
    assert machine.configs == []


class FakeTerminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "bells"), [(FakeTerminal(), 1), (io.StringIO(), 0)])
def test_an_alert_rings_a_terminal_s_bell_and_nothing_else_s(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, bells: int
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", stream)
    output = Output(is_quiet=True)
    output.alarm("x is 5", is_over=False)
    assert stream.getvalue().count("\a") == bells
    output.alarm("x is 4", is_over=True)
    assert stream.getvalue().count("\a") == bells
    assert re.sub("\x1b\\[[0-9;]*m|\a", "", stream.getvalue()) == "alert: x is 5\nalert over: x is 4\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--interval", "0.05"), "--interval is 0.05"),
        (("--interval", "0"), "--interval is 0."),
        (("--interval", "-1"), "--interval is -1"),
        (("--interval", "nan"), "--interval is nan"),
        (("--interval", "inf"), "--interval is inf"),
        (("--interval", "soon"), "'--interval'"),
        (("--duration", "0"), "--duration is 0"),
        (("--once", "--duration", "5"), "--once and --duration"),
        (("--alert", "vram"), "--alert vram has no limit"),
        (("--alert", "vrma>95"), "'vrma', which is not known"),
        (("--alert", "vram=95"), "is no limit"),
        (("--gpu", "0,"), "--gpu has an empty place"),
        (("--gpu", ""), "--gpu has an empty place"),
        (("--wait-free", "0"), "--wait-free is 0"),
        (("--wait-free", "-3"), "--wait-free is -3"),
        (("--wait-free", "nan"), "--wait-free is nan"),
        (("--wait-free", "1e300"), "--wait-free is 1e+300"),
        (("--wait-free", "20", "--once"), "--wait-free and --once"),
        (("--wait-free", "20", "--alert", "temp>1"), "--wait-free and --alert"),
        (("--wait-free", "20", "--csv", "x"), "--wait-free and --csv"),
        (("--wait-free", "20", "--no-cpu"), "--wait-free and --no-cpu"),
        (("--onec",), "--onec"),
        (("0",), "unexpected extra argument"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    machine: Machine, capsys: Capture, args: tuple[str, ...], words: str
) -> None:
    ended = Ended(capsys, *args, "--json")
    assert ended.code == 2
    assert words in ended.error_lines[0]
    assert ended.error_lines[1].startswith("hint: ")
    (record,) = ended.records
    assert record["error"]["exit_code"] == 2
    assert machine.configs == []
    assert list(Path().iterdir()) == []


def test_gpus_are_named_with_commas_or_one_by_one(machine: Machine, capsys: Capture) -> None:
    Ended(capsys, "--once", "--quiet", "--gpu", "0, 2", "--gpu", "GPU-abc")
    Ended(capsys, "--once", "--quiet")
    assert [config.gpus for config in machine.configs] == [("0", "2", "GPU-abc"), ()]


def test_elsewhere_than_on_a_terminal_people_get_lines(machine: Machine, capsys: Capture) -> None:
    machine.readings = [[GPU, make_gpu(1)]]
    ended = Ended(capsys, *AT_ONCE, "0.2")
    assert (ended.code, ended.error_lines) == (0, [])
    assert [line.split()[1] for line in ended.out.splitlines()] == ["GPU", "GPU", "host:"] * 2
    assert "\x1b" not in ended.out


def test_a_csv_file_gets_a_row_for_each_gpu_and_sample_in_every_mode(machine: Machine, capsys: Capture) -> None:
    machine.readings = [[GPU, make_lost_gpu(1)], NO_DRIVER]
    for mode in ("--json", "--quiet"):
        ended = Ended(capsys, mode, "--csv", "log.csv", *AT_ONCE, "0.2")
        assert (ended.code, len(ended.records)) == (5, 2 if mode == "--json" else 0)
    with Path("log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gpu_problem"] for row in rows] == ["", "gpu_lost", "no_driver"] * 2


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        (".", 2, "--csv . can't be written: Is a directory"),
        ("no/log.csv", 2, "--csv no/log.csv can't be written: No such file"),
        ("/dev/full", 1, "--csv /dev/full can't be written any more: No space left"),
        ("notes.txt", 2, "--csv notes.txt holds something else"),
    ],
)
def test_a_csv_file_that_can_t_be_written_ends_the_command(
    machine: Machine, capsys: Capture, path: str, code: int, words: str
) -> None:
    Path("notes.txt").write_text("mine\n")
    ended = Ended(capsys, "--quiet", "--csv", path)  # would go on for ever
    assert ended.code == code
    assert words in ended.error_lines[0]
    assert Path("notes.txt").read_text() == "mine\n"


def test_waiting_prints_the_uuid_for_scripts_and_says_the_rest_on_stderr(machine: Machine, capsys: Capture) -> None:
    machine.readings = [[make_gpu(3)], [make_gpu(3, memory_free_bytes=21 * GIB)]]
    ended = Ended(capsys, "--wait-free", "20", "--interval", "0.1")
    assert (ended.code, ended.out) == (0, "GPU-0003\n")
    assert ended.error_lines == ["Waiting for 20.0 GiB; 13.0 GiB free.", "GPU 3 has 21.0 GiB free."]


def test_waiting_quietly_prints_the_uuid_alone_or_the_index_where_there_is_none(
    machine: Machine, capsys: Capture
) -> None:
    machine.readings = [[make_gpu(3)]]
    ended = Ended(capsys, "--wait-free", "12.5", "--quiet")
    assert (ended.code, ended.out, ended.error_lines) == (0, "GPU-0003\n", [])
    machine.readings = [[make_gpu(3, uuid=None)]]
    assert Ended(capsys, "--wait-free", "12.5", "--quiet").out == "3\n"


def test_waiting_gives_one_json_object(machine: Machine, capsys: Capture) -> None:
    ended = Ended(capsys, "--wait-free", "5", "--json")
    assert (ended.code, ended.error_lines) == (0, [])
    (record,) = ended.records
    assert record == {
        "event": "MemoryFree",
        "gpu_index": 0,
        "uuid": "GPU-0000",
        "memory_free_bytes": 13 * GIB,
        "waited_s": 0.0,
    }


@pytest.mark.parametrize(
    ("reading", "args", "code", "kind"),
    [
        ([GPU], ("500",), 3, "DoesNotFitError"),
        ([GPU], ("20", *AT_ONCE, "0.15"), 3, "DoesNotFitError"),
        (NO_DRIVER, ("1",), 5, "NoGpuError"),
        ([make_lost_gpu(0)], ("1",), 5, "NoGpuError"),
        ([make_gpu(memory_free_bytes=None)], ("1",), 1, "DsftError"),
    ],
)
def test_a_wait_without_hope_ends_with_its_code_and_no_uuid(
    machine: Machine, capsys: Capture, reading: Any, args: tuple[str, ...], code: int, kind: str
) -> None:
    machine.readings = [reading]
    ended = Ended(capsys, "--quiet", "--wait-free", *args)
    assert (ended.code, ended.out) == (code, "")
    assert [line.partition(":")[0] for line in ended.error_lines] == ["error", "hint"]
    (record,) = Ended(capsys, "--json", "--wait-free", *args).records
    assert (record["error"]["kind"], record["error"]["exit_code"]) == (kind, code)


def test_help_names_every_option_and_metric(capsys: Capture) -> None:
    assert main(["monitor", "--help"]) == 0
    out = capsys.readouterr().out
    options = ("gpu", "no-cpu", "alert", "interval", "duration", "once", "csv", "wait-free", "json", "quiet")
    assert all(f"--{option} " in out for option in options)
    assert all(re.search(rf"\b{name}\b", out) for name in METRICS)


LONG_RUN = """
import sys
import dsft.cli.monitor_wait
import dsft.monitor.run as run
from dsft.cli.app import main
from dsft.monitor.sampler import Sampler
from tests.monitor_readers import ScriptedGpus, ScriptedHost, ScriptedRuns, make_gpu
gpus = ScriptedGpus([make_gpu(index) for index in range(int(sys.argv[1]))])
run.open_sampler = lambda config: Sampler(config, gpus, ScriptedHost(), ScriptedRuns())
dsft.cli.monitor_wait.NvmlGpus = lambda selection: gpus
sys.exit(main(["monitor", "--interval", "0.1", *sys.argv[2:]]))
"""

Process = subprocess.Popen[bytes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Start a watch of so many GPUs that goes on until it is stopped."""
    started: list[Process] = []

    def run(num_gpus: int, *args: str, **environment: str) -> Process:
        command = [sys.executable, "-c", LONG_RUN, str(num_gpus), *args]
        started.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=os.environ | environment,
            )
        )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
@pytest.mark.parametrize(("num_gpus", "unbuffered"), [(1, ""), (300, ""), (300, "1")])
def test_a_signal_ends_with_its_code_whole_lines_and_no_word(
    start: Any, num_gpus: int, unbuffered: str, signal_number: signal.Signals, code: int
) -> None:
    process: Process = start(num_gpus, "--json", PYTHONUNBUFFERED=unbuffered)
    assert process.stdout is not None
    first = process.stdout.read(1)  # of 300 GPUs an object is longer than a pipe holds: it is being written
    process.send_signal(signal_number)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (code, b"")
    out = first + out
    assert out.endswith(b"\n")
    assert {len(json.loads(line)["gpus"]) for line in out.splitlines()} == {num_gpus}


@pytest.mark.parametrize("args", [("--json",), (), ("--json", "--alert", "temp>5")])
def test_a_reader_that_takes_one_line_ends_it_quietly(start: Any, args: tuple[str, ...]) -> None:
    process: Process = start(1, *args)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=30) == 0
    assert [line.partition(b":")[0] for line in error.splitlines()] == ([b"alert"] if "--alert" in args else [])


def test_where_stdout_is_ascii_lines_have_lookalikes_and_no_escapes(start: Any) -> None:
    process: Process = start(1, "--duration", "0.15", PYTHONIOENCODING="ascii")
    out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, b"")
    assert b" GPU 0: memory 10.0 of 24.0 GiB | util 90 % | " in out and b"\\" not in out


def test_ctrl_c_ends_a_wait(start: Any) -> None:
    process: Process = start(1, "--wait-free", "20")
    assert process.stderr is not None
    assert process.stderr.readline() == b"Waiting for 20.0 GiB; 13.0 GiB free.\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130
