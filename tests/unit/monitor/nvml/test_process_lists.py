"""The processes of a GPU, as the driver lists them."""

import os
from itertools import pairwise

import pynvml as real_nvml
import pytest

from dsft.monitor.nvml.gpus import NvmlGpus
from tests.monitor_readers import FakeClock
from tests.nvml_scenarios import make_nvml, read_scenario


def test_lists_of_processes_are_merged() -> None:
    nvml = make_nvml(read_scenario("h200"))
    gpu = nvml.gpus[0]
    gpu.set_processes([10, 11, 12], 5 * 2**20)
    gpu.set_processes([11], 7 * 2**20, "Graphics")
    gpu.set_processes([13], None, "MPSCompute")

    (sample,) = NvmlGpus((), nvml).read(1).gpus

    assert sample.processes is not None
    told = [(process.pid, process.kind, process.memory_used_bytes) for process in sample.processes]
    assert told == [
        (11, "compute+graphics", 7 * 2**20),
        (10, "compute", 5 * 2**20),
        (12, "compute", 5 * 2**20),
        (13, "compute", None),
    ]


@pytest.mark.parametrize("unknown", [None, real_nvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value])
def test_memory_of_a_process_that_is_not_told_is_none(unknown: int | None) -> None:
    nvml = make_nvml(read_scenario("h200"))
    nvml.gpus[0].set_processes([10], unknown)
    nvml.gpus[0].set_processes([10], 0, "Graphics")
    (sample,) = NvmlGpus((), nvml).read(1).gpus
    assert sample.processes is not None
    assert sample.processes[0].memory_used_bytes == 0  # one list does tell it

    nvml.gpus[0].set_processes([10], unknown, "Graphics")
    (sample,) = NvmlGpus((), nvml).read(1).gpus
    assert sample.processes is not None
    assert sample.processes[0].memory_used_bytes is None


@pytest.mark.parametrize(
    ("answer", "percent"),
    [
        ([{"pid": 535, "timeStamp": 2, "smUtil": 40}, {"pid": 535, "timeStamp": 1, "smUtil": 90}], 40),
        ([{"pid": 535, "timeStamp": 2, "smUtil": 12345}], None),
        ([{"pid": 99, "timeStamp": 2, "smUtil": 40}], 0),
        ({"error": real_nvml.NVML_ERROR_NOT_FOUND}, 0),
        ({"error": real_nvml.NVML_ERROR_NOT_SUPPORTED}, None),
    ],
)
def test_how_busy_a_process_keeps_the_gpu(answer: object, percent: float | None) -> None:
    nvml = make_nvml(read_scenario("h200"))
    nvml.gpus[0].set("nvmlDeviceGetProcessUtilization", answer)

    (sample,) = NvmlGpus((), nvml).read(1).gpus

    assert sample.processes is not None
    assert sample.processes[0].sm_utilization_percent == percent


def test_one_gpu_a_second_is_asked_how_busy_its_processes_keep_it(clock: FakeClock) -> None:
    nvml = make_nvml({"gpus": ["h200"] * 4})
    gpus = NvmlGpus((), nvml)
    counts = []
    for _ in range(5):
        gpus.read(1)
        counts.append(nvml.num_calls["nvmlDeviceGetProcessUtilization"])
        clock.now_s += 0.5

    assert counts[0] == 4  # at first all are
    assert max(after - before for before, after in pairwise(counts)) == 1
    assert counts[-1] == 6


def test_a_process_that_came_after_the_question_is_not_told_to_be_idle(clock: FakeClock) -> None:
    nvml = make_nvml(read_scenario("h200"), [10])
    nvml.gpus[0].set("nvmlDeviceGetProcessUtilization", {"error": real_nvml.NVML_ERROR_NOT_FOUND})
    gpus = NvmlGpus((), nvml)

    def read() -> dict[int, float | None]:
        (sample,) = gpus.read(1).gpus
        return {process.pid: process.sm_utilization_percent for process in sample.processes or ()}

    assert read() == {10: 0}
    nvml.gpus[0].calls["nvmlDeviceGetComputeRunningProcesses"][0] += [
        {"pid": 11, "usedGpuMemory": 1, "gpuInstanceId": 0, "computeInstanceId": 0}
    ]
    clock.now_s += 0.5
    assert read() == {10: 0, 11: None}
    clock.now_s += 0.5
    assert read() == {10: 0, 11: 0}


def test_a_process_that_is_here_has_user_and_command() -> None:
    nvml = make_nvml(read_scenario("h200"), [os.getpid(), 2**22 + 1])

    (sample,) = NvmlGpus((), nvml).read(1).gpus

    assert sample.processes is not None
    by_pid = {process.pid: process for process in sample.processes}
    if by_pid[os.getpid()].is_visible:  # not in a container
        assert "python" in (by_pid[os.getpid()].command or "")
    gone = by_pid[2**22 + 1]
    assert (gone.is_visible, gone.user, gone.command) == (False, None, None)
