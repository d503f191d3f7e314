"""GPUs read through a fake NVML: values, faults of one counter, of one GPU and of everything, and what comes back."""

from collections.abc import Callable

import pynvml as real_nvml
import pytest

from dsft.monitor.nvml.gpus import GpuReading, NvmlGpus
from tests.fake_nvml import FakeGpu, FakeNvml, Fault, load_gpu
from tests.monitor_readers import FakeClock
from tests.nvml_scenarios import make_gpu, make_nvml, read_scenario

LOST = real_nvml.NVML_ERROR_GPU_IS_LOST
ALL = 1_000
MEMORY_V2 = f"nvmlDeviceGetMemoryInfo({real_nvml.nvmlMemory_v2})"


def not_supported() -> dict[str, int]:
    return {"error": real_nvml.NVML_ERROR_NOT_SUPPORTED}


def kind_of(reading: GpuReading) -> str | None:
    return reading.problem.kind if reading.problem is not None else None


def test_a_recorded_h200_is_read_as_its_driver_told_it() -> None:
    reading = NvmlGpus((), make_nvml(read_scenario("h200"))).read(ALL)

    assert reading.problem is None
    assert reading.driver is not None
    assert (reading.driver.version, reading.driver.cuda_version) == ("580.159.04", "13.0")
    (gpu,) = reading.gpus
    assert (gpu.index, gpu.name, gpu.problem) == (0, "NVIDIA H200", None)
    assert gpu.uuid == "GPU-00000000-2222-3333-4444-555555555555"
    assert gpu.pci_bus_id == "00000000:00:06.0"
    assert gpu.memory_used_bytes == 4421648384
    assert gpu.memory_reserved_bytes == 644939776
    assert gpu.memory_used_bytes + gpu.memory_reserved_bytes + gpu.memory_free_bytes == gpu.memory_total_bytes  # type: ignore[operator]
    assert (gpu.gpu_utilization_percent, gpu.memory_bandwidth_utilization_percent) == (1, 0)
    assert (gpu.temperature_c, gpu.temperature_slowdown_c, gpu.memory_temperature_c) == (33, 89, 32)
    assert (gpu.power_w, gpu.power_limit_w, gpu.performance_state) == (121.713, 700, "P0")
    assert (gpu.sm_clock_mhz, gpu.sm_clock_max_mhz) == (1980, 1980)
    assert (gpu.memory_clock_mhz, gpu.memory_clock_max_mhz) == (3201, 3201)
    assert (gpu.pcie_generation, gpu.pcie_generation_max, gpu.pcie_width, gpu.pcie_width_max) == (5, 5, 16, 16)
    assert (gpu.pcie_rx_bytes_per_s, gpu.pcie_tx_bytes_per_s) == (6_519_903_000, 707_766_000)
    assert gpu.fan_percent is None
    assert gpu.throttle_reasons == ()
    assert gpu.is_ecc_enabled is True
    assert (gpu.ecc_corrected_errors, gpu.ecc_uncorrected_errors) == (0, 0)
    assert (gpu.ecc_corrected_errors_lifetime, gpu.ecc_uncorrected_errors_lifetime) == (1, 0)
    assert (gpu.is_mig_enabled, gpu.migs) == (False, ())
    assert gpu.processes is not None
    (process,) = gpu.processes
    assert (process.pid, process.kind) == (535, "compute")
    assert (process.memory_used_bytes, process.sm_utilization_percent) == (4427087872, 1)


def test_values_change_from_sample_to_sample() -> None:
    gpus = NvmlGpus((), make_nvml(read_scenario("rtx4090")))

    readings = [gpus.read(1).gpus[0] for _ in range(3)]

    assert [gpu.power_w for gpu in readings] == [421.3, 446.9, 449.2]
    assert [gpu.throttle_reasons for gpu in readings] == [(), ("sw_power_cap",), ("sw_power_cap",)]
    assert [gpu.fan_percent for gpu in readings] == [52, 54, 56]  # the faster of two fans
    assert [gpu.ecc_corrected_errors for gpu in readings] == [None] * 3


def test_what_is_not_supported_is_none_and_asked_once() -> None:
    nvml = make_nvml(read_scenario("unsupported"))
    gpus = NvmlGpus((), nvml)

    (gpu,) = gpus.read(ALL).gpus
    first = nvml.num_calls.copy()
    gpus.read(ALL)
    new = nvml.num_calls - first

    told = {name: value for name, value in vars(gpu).items() if value is not None}
    assert told == {"index": 0, "uuid": gpu.uuid, "name": "NVIDIA Thing", "migs": ()}
    assert not new  # not a single question more


@pytest.mark.parametrize(
    "code",
    [
        real_nvml.NVML_ERROR_NOT_SUPPORTED,
        real_nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        real_nvml.NVML_ERROR_NO_PERMISSION,
        real_nvml.NVML_ERROR_INVALID_ARGUMENT,
        real_nvml.NVML_ERROR_UNKNOWN,
        real_nvml.NVML_ERROR_TIMEOUT,
    ],
)
def test_an_error_of_one_counter_is_none(code: int) -> None:
    nvml = make_nvml(read_scenario("h200"))
    nvml.gpus[0].set("nvmlDeviceGetPowerUsage", {"error": code})
    nvml.gpus[0].set("field(82)", {"error": code})

    (gpu,) = NvmlGpus((), nvml).read(1).gpus

    assert (gpu.problem, gpu.power_w, gpu.memory_temperature_c) == (None, None, None)
    assert gpu.temperature_c == 33


def test_an_error_that_may_pass_is_asked_for_again() -> None:
    nvml = make_nvml(read_scenario("h200"))
    nvml.gpus[0].set("nvmlDeviceGetPowerUsage", {"error": real_nvml.NVML_ERROR_TIMEOUT}, 5000)
    gpus = NvmlGpus((), nvml)

    assert [gpus.read(1).gpus[0].power_w for _ in range(2)] == [None, 5]


def test_functions_that_the_module_lacks_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = make_nvml(read_scenario("h200"))
    for name in ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetComputeRunningProcesses"):
        monkeypatch.delattr(real_nvml, name)

    (gpu,) = NvmlGpus((), nvml).read(1).gpus

    assert gpu.gpu_utilization_percent is None
    assert gpu.processes == ()  # those of graphics are told
    assert gpu.temperature_c == 33


def test_functions_that_the_module_has_and_the_driver_lacks_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = make_nvml(read_scenario("h200"))
    asked = []

    def fail(handle: object) -> None:
        asked.append(handle)
        raise real_nvml.NVMLLibraryMismatchError("another version")

    monkeypatch.setattr(nvml, "nvmlDeviceGetUtilizationRates", fail, raising=False)
    gpus = NvmlGpus((), nvml)

    for _ in range(2):
        (gpu,) = gpus.read(1).gpus
        assert (gpu.gpu_utilization_percent, gpu.temperature_c) == (None, 33)
    assert len(asked) == 1


def test_an_older_driver_tells_memory_without_what_is_reserved() -> None:
    nvml = make_nvml(read_scenario("h200"))
    nvml.gpus[0].set(MEMORY_V2, {"error": real_nvml.NVML_ERROR_FUNCTION_NOT_FOUND})

    (gpu,) = NvmlGpus((), nvml).read(1).gpus

    assert (gpu.memory_used_bytes, gpu.memory_reserved_bytes) == (5066588160, None)


def test_an_older_driver_calls_reasons_of_clocks_otherwise() -> None:
    nvml = make_nvml(read_scenario("h200"))
    nvml.gpus[0].set("nvmlDeviceGetCurrentClocksEventReasons", {"error": real_nvml.NVML_ERROR_FUNCTION_NOT_FOUND})
    nvml.gpus[0].set("nvmlDeviceGetCurrentClocksThrottleReasons", 0x44)

    assert NvmlGpus((), nvml).read(1).gpus[0].throttle_reasons == ("sw_power_cap", "hw_thermal_slowdown")


def test_static_facts_are_read_once() -> None:
    nvml = make_nvml(read_scenario("h200"))
    gpus = NvmlGpus((), nvml)
    for _ in range(3):
        gpus.read(1)

    for name in ("Name", "UUID", "PciInfo", "MaxClockInfo", "TemperatureThreshold", "EccMode", "MaxPcieLinkWidth"):
        assert nvml.num_calls[f"nvmlDeviceGet{name}"] <= 2, name  # of clocks there are two
    assert nvml.num_calls["nvmlInit"] == 1


def test_a_lost_gpu_is_told_and_the_others_go_on(clock: FakeClock) -> None:
    gpus = NvmlGpus((), make_nvml(read_scenario("lost")))

    readings = [gpus.read(1) for _ in range(4)]

    assert [kind_of(reading) for reading in readings] == [None] * 4
    problems = [reading.gpus[1].problem for reading in readings]
    assert problems[:2] == [None, None]
    assert problems[2] == problems[3]
    assert problems[2] is not None
    assert problems[2].kind == "gpu_lost"
    assert "GPU 1 (NVIDIA H200)" in problems[2].found
    assert readings[3].gpus[1].name == "NVIDIA H200"
    assert readings[3].gpus[1].uuid == readings[0].gpus[1].uuid
    assert readings[3].gpus[1].memory_used_bytes is None
    assert [reading.gpus[0].power_w for reading in readings] == [421.3, 446.9, 449.2, 438.7]


def test_a_lost_gpu_is_asked_every_five_seconds_and_comes_back(clock: FakeClock) -> None:
    nvml = make_nvml(read_scenario("h200"))
    gpus = NvmlGpus((), nvml)
    gpus.read(1)
    nvml.faults.append(Fault(LOST, gpu=0))
    gpus.read(1)
    before = nvml.num_calls.copy()

    clock.now_s += 4.9
    assert gpus.read(1).gpus[0].problem is not None
    assert not nvml.num_calls - before
    clock.now_s += 0.2
    assert gpus.read(1).gpus[0].problem is not None
    assert sum((nvml.num_calls - before).values()) == 1

    nvml.faults.clear()
    clock.now_s += 5.1
    (gpu,) = gpus.read(1).gpus
    assert (gpu.problem, gpu.temperature_c) == (None, 33)


def test_nvml_is_started_anew_now_and_then_while_a_gpu_is_lost(clock: FakeClock) -> None:
    nvml = FakeNvml([make_gpu("rtx4090", 0), make_gpu("h200", 1), make_gpu("h200", 2)])
    gpus = NvmlGpus((), nvml)
    names = [gpu.uuid for gpu in gpus.read(1).gpus]
    first = nvml.gpus.pop(0)  # it fell off the bus: the others move up
    nvml.faults.append(Fault(LOST, gpu=0))
    gpus.read(1)
    nvml.faults.clear()

    clock.now_s += 31
    reading = gpus.read(1)

    assert nvml.num_calls["nvmlInit"] == 2
    assert [gpu.uuid for gpu in reading.gpus] == names
    assert [gpu.index for gpu in reading.gpus] == [0, 1, 2]
    assert [gpu.problem is None for gpu in reading.gpus] == [False, True, True]
    assert reading.gpus[1].name == "NVIDIA H200"

    nvml.gpus.insert(0, first)
    clock.now_s += 31
    assert [gpu.problem for gpu in gpus.read(1).gpus] == [None] * 3


def test_a_gpu_that_answers_nothing_any_more_is_lost() -> None:
    nvml = make_nvml(read_scenario("two"))
    gpus = NvmlGpus((), nvml)
    gpus.read(1)
    for call in nvml.gpus[0].calls:
        nvml.gpus[0].set(call, {"error": real_nvml.NVML_ERROR_UNKNOWN})

    reading = gpus.read(1)

    assert reading.gpus[0].problem is not None
    assert reading.gpus[0].problem.kind == "gpu_lost"
    assert reading.gpus[1].problem is None


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
def test_what_stops_everything_is_told_and_tried_again_every_five_seconds(
    scenario: str, kind: str, clock: FakeClock
) -> None:
    nvml = make_nvml(read_scenario(scenario))
    gpus = NvmlGpus((), nvml)

    readings = [gpus.read(1) for _ in range(3)]

    assert [(kind_of(reading), reading.gpus) for reading in readings] == [(kind, ())] * 3
    assert nvml.num_calls["nvmlInit"] == 1

    nvml.faults.clear()
    nvml.gpus = [make_gpu("h200")]
    clock.now_s += 5
    reading = gpus.read(1)
    assert reading.problem is None
    assert reading.gpus[0].name == "NVIDIA H200"


@pytest.mark.parametrize(
    "code",
    [
        real_nvml.NVML_ERROR_UNINITIALIZED,
        real_nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        real_nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    ],
)
def test_a_driver_that_goes_and_comes_back(code: int, clock: FakeClock) -> None:
    nvml = make_nvml(read_scenario("two"))
    gpus = NvmlGpus(("1",), nvml)
    uuid = gpus.read(1).gpus[0].uuid
    nvml.faults.append(Fault(code))

    reading = gpus.read(1)
    assert reading.problem is not None
    assert (reading.driver, reading.gpus) == (None, ())
    assert not nvml.is_started  # so that the driver can be unloaded

    nvml.faults.clear()
    assert gpus.read(1).problem == reading.problem
    clock.now_s += 5
    back = gpus.read(1)
    assert back.problem is None
    assert back.driver is not None
    assert [(gpu.index, gpu.uuid) for gpu in back.gpus] == [(1, uuid)]


@pytest.mark.parametrize("code", sorted({*real_nvml.NVMLError._valClassMapping, 999, 1234}))
@pytest.mark.parametrize("function", [None, "nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_no_error_leaves_a_read(code: int, function: str | None) -> None:
    nvml = make_nvml(read_scenario("h200"))
    nvml.faults.append(Fault(code, function=function))

    reading = NvmlGpus((), nvml).read(1)

    problem = reading.problem or reading.gpus[0].problem
    assert problem is not None
    assert problem.found.endswith(".")
    assert problem.fix


def every_call(nvml: FakeNvml) -> set[str]:
    gpus = NvmlGpus((), nvml)
    gpus.read(ALL)
    gpus.read(ALL)
    return set(nvml.num_calls)


def test_no_error_of_any_function_leaves_a_read() -> None:
    for scenario in ("h200", "rtx4090", "mig"):
        for function in every_call(make_nvml(read_scenario(scenario))):
            for code in real_nvml.NVMLError._valClassMapping:
                nvml = make_nvml(read_scenario(scenario))
                gpus = NvmlGpus((), nvml)
                gpus.read(1)
                nvml.faults.append(Fault(code, function=function))
                gpus.read(ALL)
                gpus.close()


def test_pcie_is_measured_by_turns() -> None:
    nvml = FakeNvml([make_gpu("h200", 0), make_gpu("unsupported", 1), make_gpu("rtx4090", 2)])
    gpus = NvmlGpus((), nvml)

    told = []
    for _ in range(5):
        reading = gpus.read(1)
        told.append([(gpu.pcie_rx_bytes_per_s, gpu.pcie_tx_bytes_per_s) for gpu in reading.gpus])

    h200 = [values[0] for values in told]
    assert h200[0] == (6_519_903_000, None)
    assert h200[1] == (6_519_903_000, 707_766_000)
    assert [values[1] for values in told] == [(None, None)] * 5
    assert told[4][2] == (238_100_000, 14_200_000)
    calls = nvml.num_calls["nvmlDeviceGetPcieThroughput"]
    assert calls <= 6  # one a read, and what was found out about the GPU that does not tell

    gpus.read(ALL)
    nvml.num_calls.clear()
    gpus.read(ALL)
    assert nvml.num_calls["nvmlDeviceGetPcieThroughput"] == 4
    gpus.read(0)
    assert nvml.num_calls["nvmlDeviceGetPcieThroughput"] == 4


def test_a_lost_gpu_is_to_be_reset_by_its_uuid(clock: FakeClock) -> None:
    nvml = FakeNvml([make_gpu("rtx4090", 0), make_gpu("h200", 1)])
    gpus = NvmlGpus((), nvml)
    uuids = [gpu.uuid for gpu in gpus.read(1).gpus]
    nvml.faults.append(Fault(LOST, gpu=1))

    problem = gpus.read(1).gpus[1].problem

    assert problem is not None
    assert f"--gpu-reset -i {uuids[1]}." in problem.fix


def test_close_lets_go_of_nvml_and_may_come_at_any_time() -> None:
    nvml = make_nvml(read_scenario("h200"))
    gpus = NvmlGpus((), nvml)
    gpus.close()
    assert nvml.num_calls["nvmlShutdown"] == 0

    gpus.read(1)
    gpus.close()
    gpus.close()
    assert not nvml.is_started
    assert nvml.num_calls["nvmlShutdown"] == 1


def test_the_fake_has_what_the_real_module_has() -> None:
    nvml = FakeNvml([FakeGpu({})])
    functions: Callable[[str], bool] = lambda name: name.startswith("nvmlDeviceGet")  # noqa: E731

    for scenario in ("h200", "rtx4090", "mig"):
        for name in filter(functions, every_call(make_nvml(read_scenario(scenario)))):
            assert callable(getattr(real_nvml, name)), name
    with pytest.raises(AttributeError):
        nvml.nvmlDeviceGetWhatIsNot  # noqa: B018
    with pytest.raises(AttributeError):
        nvml.nvmlSystemGetProcessName  # noqa: B018  # real, but not in the fake
    for name in ("h200", "rtx4090"):
        assert load_gpu(name).calls
