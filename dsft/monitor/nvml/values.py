"""What changes from sample to sample about a GPU, but for processes and PCIe traffic."""

from typing import Any

from dsft.monitor.nvml.facts import GpuFacts
from dsft.monitor.nvml.questions import Questions
from dsft.monitor.throttle import name_reasons

_MAX_PERFORMANCE_STATE = 15


def read_values(questions: Questions, facts: GpuFacts) -> dict[str, Any]:
    """Return fields of `GpuSample` by name; what is not told is None.

    Args:
        questions: To the GPU, or to a part of it.
        facts: Of the same handle.

    Raises:
        NVMLError: The device or NVML as a whole is lost.
    """
    return {
        **read_memory(questions),
        **_read_work(questions),
        **_read_heat_and_power(questions, facts),
        **_read_clocks(questions),
        **_read_ecc(questions, facts),
        "pcie_generation": questions.ask_number("nvmlDeviceGetCurrPcieLinkGeneration"),
        "pcie_width": questions.ask_number("nvmlDeviceGetCurrPcieLinkWidth"),
    }


def read_memory(questions: Questions) -> dict[str, int | None]:
    """Return the fields of memory, which `MigSample` has too.

    Raises:
        NVMLError: The device or NVML as a whole is lost.
    """
    version = questions.nvml.nvmlMemory_v2
    memory = questions.ask("nvmlDeviceGetMemoryInfo", version)
    reserved = int(memory.reserved) if memory is not None else None
    if memory is None:  # a driver before 510; what is reserved is part of what is used there
        memory = questions.ask("nvmlDeviceGetMemoryInfo")
    return {
        "memory_used_bytes": None if memory is None else int(memory.used),
        "memory_reserved_bytes": reserved,
        "memory_free_bytes": None if memory is None else int(memory.free),
        "memory_total_bytes": None if memory is None else int(memory.total),
    }


def _read_work(questions: Questions) -> dict[str, float | None]:
    rates = questions.ask("nvmlDeviceGetUtilizationRates")
    return {
        "gpu_utilization_percent": None if rates is None else float(rates.gpu),
        "memory_bandwidth_utilization_percent": None if rates is None else float(rates.memory),
    }


def _read_heat_and_power(questions: Questions, facts: GpuFacts) -> dict[str, float | None]:
    nvml = questions.nvml
    temperature_c = questions.ask_number("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
    if temperature_c is None:
        temperature_c = questions.ask_number("nvmlDeviceGetTemperatureV", nvml.NVML_TEMPERATURE_GPU)
    power_mw = questions.ask_number("nvmlDeviceGetPowerUsage")
    limit_mw = questions.ask_number("nvmlDeviceGetEnforcedPowerLimit")
    return {
        "temperature_c": temperature_c,
        "memory_temperature_c": questions.ask_field(nvml.NVML_FI_DEV_MEMORY_TEMP) or None,
        "power_w": None if power_mw is None else power_mw / 1000,
        "power_limit_w": None if limit_mw is None else limit_mw / 1000,
        "fan_percent": _read_fan_percent(questions, facts),
    }


def _read_fan_percent(questions: Questions, facts: GpuFacts) -> int | None:
    if facts.num_fans == 0:
        return None
    if facts.num_fans is None:
        return questions.ask_number("nvmlDeviceGetFanSpeed")
    speeds = [questions.ask_number("nvmlDeviceGetFanSpeed_v2", fan) for fan in range(facts.num_fans)]
    return max((speed for speed in speeds if speed is not None), default=None)


def _read_clocks(questions: Questions) -> dict[str, Any]:
    nvml = questions.nvml
    state = questions.ask_number("nvmlDeviceGetPerformanceState")
    reasons = questions.ask_number("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # its name before driver 535
        reasons = questions.ask_number("nvmlDeviceGetCurrentClocksThrottleReasons")
    return {
        "performance_state": None if state is None or state > _MAX_PERFORMANCE_STATE else f"P{state}",
        "sm_clock_mhz": questions.ask_number("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": questions.ask_number("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "throttle_reasons": None if reasons is None else name_reasons(reasons),
    }


def _read_ecc(questions: Questions, facts: GpuFacts) -> dict[str, int | None]:
    if not facts.is_ecc_enabled:
        return {}
    nvml = questions.nvml
    corrected, uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    now, lifetime = nvml.NVML_VOLATILE_ECC, nvml.NVML_AGGREGATE_ECC

    def count(kind: int, period: int) -> int | None:
        return questions.ask_number("nvmlDeviceGetTotalEccErrors", kind, period)

    return {
        "ecc_corrected_errors": count(corrected, now),
        "ecc_uncorrected_errors": count(uncorrected, now),
        "ecc_corrected_errors_lifetime": count(corrected, lifetime),
        "ecc_uncorrected_errors_lifetime": count(uncorrected, lifetime),
    }
