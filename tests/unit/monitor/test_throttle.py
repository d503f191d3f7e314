"""NVML's bits of throttling as names and words."""

import pynvml as nvml
import pytest

from dsft.monitor.throttle import explain_reasons, find_reason, name_reasons


@pytest.mark.parametrize(
    ("bit", "name", "is_brake", "is_alarming"),
    [
        (nvml.nvmlClocksEventReasonGpuIdle, "gpu_idle", False, False),
        (nvml.nvmlClocksEventReasonApplicationsClocksSetting, "applications_clocks_setting", False, False),
        (nvml.nvmlClocksEventReasonSwPowerCap, "sw_power_cap", True, False),
        (nvml.nvmlClocksEventReasonHwSlowdown, "hw_slowdown", True, True),
        (nvml.nvmlClocksEventReasonSyncBoost, "sync_boost", True, False),
        (nvml.nvmlClocksEventReasonSwThermalSlowdown, "sw_thermal_slowdown", True, True),
        (nvml.nvmlClocksEventReasonHwThermalSlowdown, "hw_thermal_slowdown", True, True),
        (nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, "hw_power_brake_slowdown", True, True),
        (nvml.nvmlClocksEventReasonDisplayClockSetting, "display_clock_setting", False, False),
    ],
)
def test_each_bit_of_nvml_has_a_name_and_words(bit: int, name: str, is_brake: bool, is_alarming: bool) -> None:
    assert name_reasons(bit) == (name,)

    reason = find_reason(name)
    assert (reason.name, reason.is_brake, reason.is_alarming) == (name, is_brake, is_alarming)
    assert reason.words
    assert "_" not in reason.words


def test_every_bit_that_nvml_knows_is_known() -> None:
    names = name_reasons(nvml.nvmlClocksEventReasonAll)

    assert len(names) == 9
    assert not [name for name in names if name.startswith("unknown")]


def test_several_bits_are_told_and_none_are_none() -> None:
    assert name_reasons(0) == ()
    assert name_reasons(0x44) == ("sw_power_cap", "hw_thermal_slowdown")


def test_unknown_bits_keep_their_number() -> None:
    assert name_reasons(0x8000_0000_0000_0204) == ("sw_power_cap", "unknown_0x200", "unknown_0x8000000000000000")

    reason = find_reason("unknown_0x200")
    assert (reason.words, reason.is_brake) == ("reason 0x200", True)


def test_the_gravest_reason_comes_first_and_a_cause_stands_for_its_effect() -> None:
    reasons = explain_reasons(("gpu_idle", "sw_power_cap", "hw_slowdown", "hw_thermal_slowdown"))

    assert [reason.name for reason in reasons] == ["hw_thermal_slowdown", "sw_power_cap", "gpu_idle"]
    assert [reason.name for reason in explain_reasons(("hw_slowdown",))] == ["hw_slowdown"]
