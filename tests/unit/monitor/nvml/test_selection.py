"""Which GPUs and MIG instances are watched."""

import pytest

from dsft.core.errors import ConfigError
from dsft.monitor.nvml.gpus import NvmlGpus
from tests.fake_nvml import FakeNvml
from tests.monitor_readers import FakeClock
from tests.nvml_scenarios import make_gpu, make_nvml, read_scenario


@pytest.mark.parametrize(
    ("selection", "indexes"),
    [
        ((), [0, 1, 2]),
        (("1",), [1]),
        (("2", "0"), [0, 2]),
        (("GPU-00000001-2222-3333-4444-555555555555",), [1]),
        (("00000001-2222-3333-4444-555555555555", "1"), [1]),
        (("gpu-00000002",), [2]),
        (("00000002",), [2]),
    ],
)
def test_gpus_are_selected_by_index_or_uuid(selection: tuple[str, ...], indexes: list[int]) -> None:
    gpus = NvmlGpus(selection, make_nvml({"gpus": ["h200"] * 3}))

    assert [gpu.index for gpu in gpus.read(1).gpus] == indexes


@pytest.mark.parametrize("wrong", ["3", "-1", "GPU-1", "GPU-0000000", "", "GPU-", "x"])
def test_a_selection_that_cannot_be_names_what_is_there(wrong: str) -> None:
    gpus = NvmlGpus(("0", wrong), make_nvml({"gpus": ["h200"] * 3}))

    for _ in range(2):
        with pytest.raises(ConfigError, match="--gpu") as raised:
            gpus.read(1)
        assert "2 (GPU-00000002-2222-3333-4444-555555555555)" in str(raised.value)


def test_a_gpu_that_is_lost_at_first_is_selected_by_index(clock: FakeClock) -> None:
    nvml = make_nvml(read_scenario("lost_at_first"))
    gpus = NvmlGpus(("1",), nvml)

    (gpu,) = gpus.read(1).gpus
    assert gpu.index == 1
    assert gpu.uuid is None
    assert gpu.problem is not None

    nvml.faults.clear()
    clock.now_s += 5
    (gpu,) = gpus.read(1).gpus
    assert (gpu.index, gpu.name, gpu.problem) == (1, "NVIDIA H200", None)


@pytest.mark.parametrize(
    ("selection", "instances"),
    [
        (("MIG-00000002-7777-6666-5555-444444444444",), [2]),
        (("mig-00000000",), [0]),
        (("MIG-00000000", "MIG-00000002"), [0, 2]),
        (("MIG-00000000", "1"), [0, 2]),
        (("1",), [0, 2]),
    ],
)
def test_a_mig_instance_is_selected_by_its_uuid(
    selection: tuple[str, ...], instances: list[int], clock: FakeClock
) -> None:
    gpus = NvmlGpus(selection, FakeNvml([make_gpu("h200", 0), make_gpu("mig", 1)]))

    for _ in range(3):
        (gpu,) = gpus.read(1).gpus
        assert (gpu.index, [mig.index for mig in gpu.migs]) == (1, instances)
        clock.now_s += 6


@pytest.mark.parametrize("wrong", ["MIG-1", "MIG-0000000", "MIG-", "00000002-7777"])
def test_a_mig_instance_that_is_not_there_is_refused_with_those_that_are(wrong: str) -> None:
    gpus = NvmlGpus((wrong,), FakeNvml([make_gpu("h200", 0), make_gpu("mig", 1)]))

    with pytest.raises(ConfigError, match=f"--gpu {wrong}") as raised:
        gpus.read(1)
    assert "1 (MIG-00000002-7777-6666-5555-444444444444)" in str(raised.value)
