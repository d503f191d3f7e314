"""The real command where NVML is the fake: what scripts get of drivers, GPUs and MIG, and of what is wrong."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.monitor_driver import SECRET

UUIDS = [f"GPU-{index:08x}-2222-3333-4444-555555555555" for index in range(2)]


class Ended:
    """How a command ended, and what it had written."""

    def __init__(self, repository: Path, folder: Path, scenario: str, *args: str) -> None:
        driver = repository / "tests" / "monitor_driver.py"
        done = subprocess.run(
            [sys.executable, str(driver), scenario, "--", "monitor", *args],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.code, self.out, self.error_lines = done.returncode, done.stdout, done.stderr.splitlines()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line, parse_constant=pytest.fail) for line in self.out.splitlines()]


@pytest.fixture
def run(repository: Path, tmp_path: Path) -> Any:
    """Run `dsft monitor` on the machine of a scenario, in an empty folder."""
    return lambda scenario, *args: Ended(repository, tmp_path, scenario, *args)


def test_one_object_tells_of_gpu_processes_and_host(run: Any) -> None:
    ended = run("busy", "--once", "--json", "--alert", "temp>200", "--alert", "cpu>=0")
    (record,) = ended.records
    (gpu,) = record["gpus"]
    assert (ended.code, ended.error_lines[0].partition(":")[0]) == (4, "alert")
    assert (gpu["uuid"], gpu["problem"], len(gpu["processes"])) == (UUIDS[0], None, 20)
    assert (
        gpu["memory_used_bytes"] + gpu["memory_reserved_bytes"] + gpu["memory_free_bytes"] == gpu["memory_total_bytes"]
    )
    assert record["host"]["memory_total_bytes"] > 0
    assert record["host"]["cpu_percent"] is not None  # a single sample takes a moment for it
    assert [alert["is_fired"] for alert in record["alerts"]] == [False, True]
    assert SECRET not in ended.out


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [
        ("no_driver", "no_driver"),
        ("not_loaded", "driver_not_loaded"),
        ("version_mismatch", "version_mismatch"),
        ("no_permission", "no_permission"),
        ("no_gpu", "no_gpu"),
    ],
)
def test_without_a_usable_gpu_scripts_get_one_object_and_code_5(run: Any, scenario: str, kind: str) -> None:
    ended = run(scenario, "--once", "--json")
    assert ended.code == 5
    (record,) = ended.records
    problem = record["problem"]
    assert problem["kind"] == kind
    assert (record["gpus"], record["host"]["num_cpus"] > 0) == ([], True)
    assert ended.error_lines == [f"error: {problem['found']}", f"hint: {problem['fix']}"]


def test_people_get_sentence_and_host_once_without_a_driver(run: Any) -> None:
    ended = run("no_driver", "--once")
    assert ended.code == 5
    sentence = ended.error_lines[0].removeprefix("error: ")
    assert sentence in " ".join(ended.out.split())
    assert "CPU" in ended.out
    assert "\x1b" not in ended.out
    assert "CPU" not in run("no_driver", "--once", "--no-cpu").out


def test_people_get_the_gpu_once(run: Any) -> None:
    ended = run("h200", "--once")
    assert (ended.code, ended.error_lines) == (0, [])
    assert "H200" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 100


def test_a_gpu_lost_in_mid_watch_is_told_in_every_format(run: Any, tmp_path: Path) -> None:
    ended = run("lost", "--json", "--interval", "0.1", "--duration", "1", "--csv", "log.csv")
    assert ended.code == 5
    problems = [[gpu["problem"] is not None for gpu in record["gpus"]] for record in ended.records]
    assert problems[0] == [False, False]
    assert problems[-1] == [False, True]
    lost = ended.records[-1]["gpus"][1]
    assert (lost["uuid"], lost["problem"]["kind"], lost["memory_used_bytes"]) == (UUIDS[1], "gpu_lost", None)
    assert ended.error_lines == [f"error: {lost['problem']['found']}", f"hint: {lost['problem']['fix']}"]
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gpu_problem"] == "gpu_lost" for row in rows] == [is_lost for both in problems for is_lost in both]


def test_a_lost_gpu_that_is_not_watched_is_no_error(run: Any) -> None:
    ended = run("lost_at_first", "--once", "--json", "--gpu", "0")
    assert (ended.code, ended.error_lines) == (0, [])
    assert [gpu["index"] for gpu in ended.records[0]["gpus"]] == [0]
    assert run("lost_at_first", "--once", "--quiet").code == 5


def test_a_driver_that_is_lost_in_mid_watch_ends_with_5(run: Any) -> None:
    ended = run("driver_lost", "--json", "--interval", "0.1", "--duration", "1")
    assert ended.code == 5
    assert [record["problem"] is None for record in (ended.records[0], ended.records[-1])] == [True, False]


@pytest.mark.parametrize("gpu", ["9", "-1", "GPU-ffff", "0,9", "x"])
def test_a_gpu_that_is_not_there_is_wrong_input(run: Any, gpu: str) -> None:
    ended = run("two", "--once", "--json", "--gpu", gpu)
    assert ended.code == 2
    (record,) = ended.records
    assert record["error"]["kind"] == "ConfigError"
    assert f"--gpu {gpu.rpartition(',')[2]} is not there" in ended.error_lines[0]
    assert all(uuid in ended.error_lines[1] for uuid in UUIDS)


def test_gpus_are_chosen_by_index_and_uuid_whatever_cuda_sees(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for chosen, indexes in (("1", [1]), (UUIDS[0], [0]), (f"1,{UUIDS[0]}", [0, 1]), ("1,1", [1])):
        records = run("two", "--once", "--json", "--no-cpu", "--gpu", chosen).records
        assert [gpu["index"] for gpu in records[0]["gpus"]] == indexes


def test_what_a_gpu_does_not_tell_is_null_and_can_t_be_judged(run: Any) -> None:
    ended = run("unsupported", "--once", "--json", "--alert", "temp>5")
    assert ended.code == 1
    (gpu,) = ended.records[0]["gpus"]
    told = {name for name, value in gpu.items() if value not in (None, [])}
    assert told <= {"index", "uuid", "name", "is_mig_enabled"}
    assert ended.error_lines[0] == "error: The alert temp>5 can't be judged: GPU 0 does not tell it."
    ended = run("unsupported", "--wait-free", "1", "--quiet")
    assert (ended.code, ended.out) == (1, "")


def test_waiting_names_the_gpu_with_room_or_the_mig_instance(run: Any) -> None:
    ended = run("two", "--wait-free", "100", "--quiet")
    assert (ended.code, ended.out, ended.error_lines) == (0, f"{UUIDS[1]}\n", [])
    ended = run("mig", "--wait-free", "14", "--quiet")
    assert (ended.code, ended.out) == (0, "MIG-00000000-7777-6666-5555-444444444444\n")
    assert run("mig", "--wait-free", "20", "--quiet").code == 3  # the card has that much, its parts do not
    assert run("no_driver", "--wait-free", "1", "--quiet").code == 5


@pytest.mark.parametrize("mode", ["--json", "--once"])
def test_a_pipe_to_head_ends_with_0_and_no_traceback(repository: Path, tmp_path: Path, mode: str) -> None:
    driver = repository / "tests" / "monitor_driver.py"
    script = f'set -o pipefail; "{sys.executable}" "{driver}" two -- monitor {mode} --interval 0.1 | head -1'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
