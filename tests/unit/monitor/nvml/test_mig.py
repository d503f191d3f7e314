"""The MIG instances of a GPU."""

from dsft.monitor.nvml.gpus import NvmlGpus
from tests.monitor_readers import FakeClock
from tests.nvml_scenarios import make_nvml, read_scenario


def test_mig_instances_have_memory_and_processes_of_their_own() -> None:
    nvml = make_nvml(read_scenario("mig"))

    (gpu,) = NvmlGpus((), nvml).read(1).gpus

    assert (gpu.is_mig_enabled, gpu.gpu_utilization_percent, gpu.processes) == (True, None, None)
    assert [mig.index for mig in gpu.migs] == [0, 2]
    assert gpu.migs[1].uuid == "MIG-00000002-7777-6666-5555-444444444444"
    assert gpu.migs[1].name == "NVIDIA H200 MIG 1g.18gb"
    assert gpu.migs[1].memory_used_bytes == 3 * 2**30
    assert gpu.migs[1].processes is not None
    assert [process.pid for process in gpu.migs[1].processes] == [4002]
    assert gpu.migs[1].processes[0].sm_utilization_percent is None


def test_mig_instances_come_and_go(clock: FakeClock) -> None:
    nvml = make_nvml(read_scenario("mig"))
    gpus = NvmlGpus((), nvml)
    first, second = gpus.read(1).gpus[0].migs
    part = nvml.gpus[0].migs[2]
    nvml.gpus[0].migs[2] = None
    nvml.gpus[0].migs[5] = part

    assert [mig.index for mig in gpus.read(1).gpus[0].migs] == [first.index, second.index]
    clock.now_s += 5
    assert [mig.index for mig in gpus.read(1).gpus[0].migs] == [0, 5]


def test_mig_that_is_turned_off_is_seen(clock: FakeClock) -> None:
    nvml = make_nvml(read_scenario("mig"))
    gpus = NvmlGpus((), nvml)
    assert gpus.read(1).gpus[0].gpu_utilization_percent is None

    nvml.gpus[0].set("nvmlDeviceGetMigMode", [0, 0])
    nvml.gpus[0].set("nvmlDeviceGetUtilizationRates", {"gpu": 1, "memory": 0})
    nvml.gpus[0].migs.clear()
    clock.now_s += 5
    (gpu,) = gpus.read(1).gpus
    assert (gpu.is_mig_enabled, gpu.migs, gpu.gpu_utilization_percent) == (False, (), 1)
