"""What the script records is replayed as the same readings."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pynvml as real_nvml
import pytest

from dsft.monitor.nvml.gpus import NvmlGpus
from tests import fake_nvml
from tests.fake_nvml import FakeNvml, load_gpu
from tests.nvml_scenarios import make_nvml, read_scenario

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "record_nvml.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_nvml", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("scenario", ["h200", "rtx4090", "mig", "unsupported"])
def test_a_recording_gives_the_same_readings(
    script: ModuleType, scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = script.record(make_nvml(read_scenario(scenario)), 0, 3, 0)
    first = NvmlGpus((), make_nvml(read_scenario(scenario)))
    (tmp_path / "new.json").write_text(json.dumps(recording), encoding="utf-8")
    monkeypatch.setattr(fake_nvml, "RECORDINGS", tmp_path)
    gpu = load_gpu("new")
    gpu.set("nvmlDeviceGetUUID", "GPU-00000000-2222-3333-4444-555555555555")
    for index, part in enumerate(gpu.migs):
        if part is not None:
            part.set("nvmlDeviceGetUUID", f"MIG-{index:08x}-7777-6666-5555-444444444444")

    replayed = NvmlGpus((), FakeNvml([gpu]))

    for _ in range(3):
        assert replayed.read(2).gpus == first.read(2).gpus


def test_a_recording_names_no_uuid_of_the_machine(script: ModuleType) -> None:
    recording = script.record(make_nvml(read_scenario("h200")), 0, 1, 0)

    assert recording["calls"]["nvmlDeviceGetUUID"] == ["GPU-11111111-2222-3333-4444-555555555555"]


def test_errors_are_recorded_by_their_code(script: ModuleType) -> None:
    recording = script.record(make_nvml(read_scenario("unsupported")), 0, 2, 0)

    for call in ("nvmlDeviceGetPowerUsage", "field(82)"):
        assert recording["calls"][call] == [{"error": real_nvml.NVML_ERROR_NOT_SUPPORTED}]


def test_structures_of_the_real_module_become_json(script: ModuleType) -> None:
    memory = real_nvml.c_nvmlMemory_v2_t()
    memory.used = 5
    process = real_nvml.nvmlFriendlyObject({"pid": 3, "usedGpuMemory": None})

    assert script.to_json(memory)["used"] == 5
    assert script.to_json([process, b"x"]) == [{"pid": 3, "usedGpuMemory": None}, "x"]


def test_a_machine_without_a_gpu_is_told(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="NVIDIA"):
        script.record(make_nvml(read_scenario("not_loaded")), 0, 1, 0)
