"""Real NVML: every figure of the monitor against nvidia-smi, asked just before and just after."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.gpu

MIB = 1024**2

STATIC = {
    "uuid": ("uuid", str),
    "name": ("name", str),
    "pci.bus_id": ("pci_bus_id", str),
    "memory.total": ("memory_total_bytes", lambda text: float(text) * MIB),
    "enforced.power.limit": ("power_limit_w", float),
    "clocks.max.sm": ("sm_clock_max_mhz", float),
    "clocks.max.mem": ("memory_clock_max_mhz", float),
    "pcie.link.gen.gpumax": ("pcie_generation_max", float),
    "pcie.link.width.max": ("pcie_width_max", float),
    "ecc.mode.current": ("is_ecc_enabled", lambda text: text == "Enabled"),
    "ecc.errors.corrected.volatile.total": ("ecc_corrected_errors", float),
    "ecc.errors.uncorrected.volatile.total": ("ecc_uncorrected_errors", float),
    "ecc.errors.corrected.aggregate.total": ("ecc_corrected_errors_lifetime", float),
    "ecc.errors.uncorrected.aggregate.total": ("ecc_uncorrected_errors_lifetime", float),
    "mig.mode.current": ("is_mig_enabled", lambda text: text == "Enabled"),
}
"""What does not change between three looks: nvidia-smi's field, ours, and how its text is read."""

MOVING = {
    "memory.used": ("memory_used_bytes", MIB, 1 * MIB),
    "memory.free": ("memory_free_bytes", MIB, 1 * MIB),
    "memory.reserved": ("memory_reserved_bytes", MIB, 1 * MIB),
    "utilization.gpu": ("gpu_utilization_percent", 1, 0),
    "utilization.memory": ("memory_bandwidth_utilization_percent", 1, 0),
    "temperature.gpu": ("temperature_c", 1, 1),
    "temperature.memory": ("memory_temperature_c", 1, 1),
    "power.draw": ("power_w", 1, 0.5),
    "clocks.sm": ("sm_clock_mhz", 1, 0),
    "clocks.mem": ("memory_clock_mhz", 1, 0),
    "pcie.link.gen.gpucurrent": ("pcie_generation", 1, 0),
    "pcie.link.width.current": ("pcie_width", 1, 0),
    "fan.speed": ("fan_percent", 1, 1),
}
"""What may move: nvidia-smi's field, ours, its unit in ours, and how far ours may lie beyond the two looks."""

LOAD = """
import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print("ready", flush=True)
while True:
    for _ in range(50):
        a @ a
    torch.cuda.synchronize()
"""


def ask_smi(query: str, fields: list[str]) -> list[dict[str, str]]:
    command = ["nvidia-smi", f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [dict(zip(fields, row, strict=True)) for row in csv.reader(io.StringIO(text), skipinitialspace=True)]


def is_told(text: str) -> bool:
    return not text.startswith("[") and text not in ("N/A", "")


@pytest.fixture(scope="module")
def load() -> Iterator[int]:
    """A process that keeps GPU 0 busy; its PID."""
    child = subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "ready"
    yield child.pid
    child.kill()
    child.wait()


def take_sample(run_dsft) -> dict:
    completed = run_dsft("monitor", "--once", "--json")
    assert completed.returncode == 0, completed.stderr
    [line] = completed.stdout.splitlines()
    return json.loads(line)


def test_every_field_is_nvidia_smis(run_dsft, load: int) -> None:
    fields = ["index", *STATIC, *MOVING, "pstate", "driver_version"]
    mismatches: dict[str, list] = {}
    for _ in range(3):  # a load that starts or ends between the looks may move a value out and back
        before = ask_smi("gpu", fields)
        sample = take_sample(run_dsft)
        after = ask_smi("gpu", fields)
        mismatches = {}
        assert [gpu["index"] for gpu in sample["gpus"]] == [int(row["index"]) for row in before]
        for gpu, first, second in zip(sample["gpus"], before, after, strict=True):
            assert sample["driver"]["version"] == first["driver_version"]
            for field, (ours, read) in STATIC.items():
                expected = read(first[field]) if is_told(first[field]) else None
                if gpu[ours] != expected and not (
                    isinstance(expected, float)
                    and gpu[ours] == pytest.approx(expected, abs=MIB if expected > MIB else 0.01)
                ):
                    mismatches[field] = [gpu[ours], first[field]]
            for field, (ours, unit, slack) in MOVING.items():
                if not (is_told(first[field]) and is_told(second[field])):
                    if gpu[ours] is not None:
                        mismatches[field] = [gpu[ours], first[field], second[field]]
                    continue
                low, high = sorted(float(row[field]) * unit for row in (first, second))
                # Utilisation and power are means over a driver's window, which lies between those of the two looks.
                slack_here = max(slack, 0.1 * high) if field.startswith(("utilization", "power")) else slack
                if gpu[ours] is None or not low - slack_here <= gpu[ours] <= high + slack_here:
                    mismatches[field] = [gpu[ours], first[field], second[field]]
            if gpu["performance_state"] not in (first["pstate"], second["pstate"]):
                mismatches["pstate"] = [gpu["performance_state"], first["pstate"]]
        if not mismatches:
            break
    assert mismatches == {}


def test_the_processes_are_nvidia_smis(run_dsft, load: int) -> None:
    [gpu, *_] = take_sample(run_dsft)["gpus"]
    rows = ask_smi("compute-apps", ["gpu_uuid", "pid", "used_memory"])
    expected = {int(row["pid"]): int(row["used_memory"]) for row in rows if row["gpu_uuid"] == gpu["uuid"]}
    assert load in expected
    told = {process["pid"]: process for process in gpu["processes"] if "compute" in process["kind"]}
    assert {pid: process["memory_used_bytes"] // MIB for pid, process in told.items()} == expected
    assert told[load]["is_visible"]
    assert "import torch" in told[load]["command"]
    assert told[load]["user"]


def test_a_gpu_that_is_busy_shows_it(run_dsft, load: int) -> None:
    completed = run_dsft("monitor", "--json", "--interval", "0.5", "--duration", "3", "--gpu", "0", "--no-cpu")
    samples = [json.loads(line) for line in completed.stdout.splitlines()]
    assert completed.returncode == 0, completed.stderr
    assert len(samples) == 6
    assert max(sample["gpus"][0]["gpu_utilization_percent"] for sample in samples) > 50
    assert all(sample["gpus"][0]["throttle_reasons"] is not None for sample in samples)
    assert samples[-1]["gpus"][0]["pcie_rx_bytes_per_s"] is not None


def test_an_alert_on_real_figures(run_dsft, load: int) -> None:
    completed = run_dsft("monitor", "--once", "--alert", "util>1", "--alert", "temp>200", "--no-cpu")
    assert completed.returncode == 4
    assert "util is" in completed.stderr
    assert "temp" not in completed.stderr


def test_free_memory_is_found_at_once(run_dsft) -> None:
    completed = run_dsft("monitor", "--wait-free", "0.5", "--json", "--gpu", "0")
    [record] = map(json.loads, completed.stdout.splitlines())
    assert completed.returncode == 0
    assert record["uuid"].startswith(("GPU-", "MIG-"))
    assert record["memory_free_bytes"] > 0.5 * 1024**3
