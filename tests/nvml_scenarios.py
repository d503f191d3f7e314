"""Machines for tests of the monitor, by name: which GPUs there are, what uses them, and what goes wrong."""

import json
from pathlib import Path
from typing import Any

import pynvml as real_nvml

from tests.fake_nvml import FakeGpu, FakeNvml, Fault, load_gpu

_GIB = 2**30
_MEMORY = f"nvmlDeviceGetMemoryInfo({real_nvml.nvmlMemory_v2})"

SCENARIOS: dict[str, dict[str, Any]] = {
    "h200": {"gpus": ["h200"]},
    "rtx4090": {"gpus": ["rtx4090"]},
    "two": {"gpus": ["rtx4090", "h200"]},
    "eight": {"gpus": ["h200"] * 8},
    "busy": {"gpus": ["h200"], "num_processes": 20},
    "no_gpu": {"gpus": []},
    "no_driver": {"faults": [{"error": real_nvml.NVML_ERROR_LIBRARY_NOT_FOUND}]},
    "not_loaded": {"faults": [{"error": real_nvml.NVML_ERROR_DRIVER_NOT_LOADED}]},
    "version_mismatch": {"faults": [{"error": real_nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}]},
    "no_permission": {"faults": [{"error": real_nvml.NVML_ERROR_NO_PERMISSION, "function": "nvmlInit"}]},
    "lost": {
        "gpus": ["rtx4090", "h200"],
        "faults": [{"error": real_nvml.NVML_ERROR_GPU_IS_LOST, "gpu": 1, "from_sample": 2}],
    },
    "lost_at_first": {"gpus": ["rtx4090", "h200"], "faults": [{"error": real_nvml.NVML_ERROR_GPU_IS_LOST, "gpu": 1}]},
    "driver_lost": {
        "gpus": ["h200"],
        "faults": [{"error": real_nvml.NVML_ERROR_UNINITIALIZED, "from_sample": 2}],
    },
    "unsupported": {"gpus": ["unsupported"]},
    "mig": {"gpus": ["mig"], "num_processes": 2},
}
"""`gpus`: names of recordings, or `unsupported` or `mig`, which are made here. `num_processes`: that many use each."""


def read_scenario(name: str) -> dict[str, Any]:
    """Return a scenario by its name or from a JSON file of the same layout."""
    if name in SCENARIOS:
        return SCENARIOS[name]
    scenario: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
    return scenario


def make_nvml(scenario: dict[str, Any], pids: list[int] | None = None) -> FakeNvml:
    """Return the machine of a scenario.

    Args:
        scenario: Its description.
        pids: Processes that use each GPU; None leaves those of the recording.
    """
    gpus = [make_gpu(name, index) for index, name in enumerate(scenario.get("gpus", ["h200"]))]
    if pids is not None:
        for gpu in gpus:
            gpu.set_processes(pids)
            for part in gpu.migs:
                if part is not None:
                    part.set_processes(pids)
    return FakeNvml(gpus, [Fault(**fault) for fault in scenario.get("faults", [])])


def make_gpu(name: str, index: int = 0) -> FakeGpu:
    """Return a GPU with a UUID of its own."""
    if name == "unsupported":
        gpu = FakeGpu({"nvmlDeviceGetName": ["NVIDIA Thing"]})
    elif name == "mig":
        gpu = _make_mig()
    else:
        gpu = load_gpu(name)
    gpu.set("nvmlDeviceGetUUID", f"GPU-{index:08x}-2222-3333-4444-555555555555")
    return gpu


def _make_mig() -> FakeGpu:
    """Return an H200 with MIG on and two of seven instances made; made up, as no recording of one is at hand."""
    gpu = load_gpu("h200")
    gpu.set("nvmlDeviceGetMigMode", [1, 1])
    for call in ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetProcessUtilization"):
        gpu.set(call, {"error": real_nvml.NVML_ERROR_NOT_SUPPORTED})
    gpu.migs = [_make_part(0), None, _make_part(2), *[None] * 4]
    return gpu


def _make_part(index: int) -> FakeGpu:
    total, used, reserved = 16 * _GIB, (index + 1) * _GIB, _GIB // 8
    part = FakeGpu(
        {
            "nvmlDeviceGetName": ["NVIDIA H200 MIG 1g.18gb"],
            "nvmlDeviceGetUUID": [f"MIG-{index:08x}-7777-6666-5555-444444444444"],
            _MEMORY: [{"total": total, "reserved": reserved, "free": total - used - reserved, "used": used}],
            "nvmlDeviceGetGraphicsRunningProcesses": [[]],
        }
    )
    part.set_processes([4000 + index], used)
    return part
