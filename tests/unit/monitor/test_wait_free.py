"""Waiting until a device has memory free: which one it is, and when there is no use in waiting."""

from collections.abc import Iterable
from typing import Any

import pytest

from dsft.core.errors import ConfigError, DoesNotFitError, DsftError, NoGpuError
from dsft.core.units import GIB
from dsft.monitor.config import MonitorConfig
from dsft.monitor.nvml.gpus import GpuReading
from dsft.monitor.sample import GpuSample, Problem
from dsft.monitor.wait_free import MemoryFree, wait_free
from tests.monitor_readers import NO_DRIVER, FakeClock, ScriptedGpus, make_gpu, make_lost_gpu, make_mig


class Waited:
    """A wait on scripted GPUs.

    Attributes:
        told_gib: What was told at each look that found too little.
        told_lost: What was told of GPUs that were lost.
    """

    def __init__(self, needed_gib: float, *readings: Iterable[GpuSample] | Problem, **settings: Any) -> None:
        self.clock = FakeClock()
        self.told_gib: list[float] = []
        self.told_lost: list[str] = []
        self.found: MemoryFree | None = None
        self.error: DsftError | None = None
        gpus = ScriptedGpus(*readings)
        try:
            self.found = wait_free(
                MonitorConfig(**settings),
                round(needed_gib * GIB),
                gpus,
                lambda free_bytes: self.told_gib.append(free_bytes / GIB),
                on_lost=lambda problem: self.told_lost.append(problem.found),
                sleep=self.clock.sleep,
                clock=self.clock,
            )
        except DsftError as error:
            self.error = error
        assert set(gpus.num_pcie_measurements) <= {0}


def with_free(free_gib: float, index: int = 0, **values: Any) -> GpuSample:
    return make_gpu(index, memory_free_bytes=round(free_gib * GIB), **values)


def test_what_is_free_already_is_found_without_waiting() -> None:
    waited = Waited(13, [with_free(13)])
    assert waited.found == MemoryFree(0, "GPU-0000", 13 * GIB, 0.0)
    assert (waited.told_gib, waited.clock.slept_s) == ([], [])


def test_it_waits_in_steps_of_the_interval_and_tells_what_is_free() -> None:
    waited = Waited(20, [with_free(3)], [with_free(19.99)], [with_free(22)], interval_s=2.0)
    assert waited.found == MemoryFree(0, "GPU-0000", 22 * GIB, 4.0)
    assert waited.told_gib == [3.0, pytest.approx(19.99)]
    assert waited.clock.slept_s == [2.0, 2.0]


def test_of_several_the_one_with_most_free_is_named() -> None:
    waited = Waited(5, [with_free(6, 0), with_free(9, 2), with_free(7, 3)])
    assert waited.found is not None
    assert (waited.found.gpu_index, waited.found.uuid) == (2, "GPU-0002")


def test_a_time_that_is_over_ends_with_a_last_look() -> None:
    waited = Waited(20, [with_free(3)], interval_s=2.0, duration_s=5.0)
    assert isinstance(waited.error, DoesNotFitError)
    assert "20.0 GiB did not become free within 5 s; the most is 3.0 GiB on GPU 0" in waited.error.found
    assert waited.clock.slept_s == [2.0, 2.0, 1.0]
    waited = Waited(20, *[[with_free(3)]] * 3, [with_free(21)], interval_s=2.0, duration_s=5.0)
    assert waited.found is not None
    assert waited.found.waited_s == 5.0


@pytest.mark.parametrize("needed_gib", [23.5, 24, 500])
def test_more_than_the_largest_device_can_ever_have_is_not_waited_for(needed_gib: float) -> None:
    # 24 GiB, of which the driver reserves 1
    waited = Waited(needed_gib, [with_free(3), with_free(2, 1, memory_total_bytes=8 * GIB)])
    assert isinstance(waited.error, DoesNotFitError)
    assert f"{needed_gib:g} GiB can't become free: the largest device has 23.00 GiB" in waited.error.found
    assert waited.clock.slept_s == []


def test_24_gib_on_a_card_of_24_gb_are_told_apart_from_what_it_has() -> None:
    card = with_free(20, memory_total_bytes=24564 * 1024**2, memory_reserved_bytes=None)
    waited = Waited(24, [card])
    assert waited.error is not None
    assert "24 GiB can't become free: the largest device has 23.99 GiB" in waited.error.found


def test_without_a_driver_or_with_lost_gpus_alone_nobody_waits() -> None:
    for reading, found in ((NO_DRIVER, NO_DRIVER.found), ([make_lost_gpu()], "GPU 1 is lost.")):
        waited = Waited(1, reading)
        assert isinstance(waited.error, NoGpuError)
        assert waited.error.found == found
        assert waited.error.fix


def test_a_lost_gpu_among_others_is_passed_by() -> None:
    waited = Waited(5, [make_lost_gpu(0), with_free(9, 1)])
    assert waited.found is not None
    assert waited.found.gpu_index == 1


def test_a_larger_gpu_that_is_lost_may_come_back() -> None:
    small = with_free(3, 0, memory_total_bytes=8 * GIB)
    waited = Waited(20, *[[small, make_lost_gpu(1)]] * 3, [small, with_free(21, 1)])
    assert waited.found == MemoryFree(1, "GPU-0001", 21 * GIB, 3.0)
    assert waited.told_lost == ["GPU 1 is lost."]
    assert waited.told_gib == [3, 3, 3]
    waited = Waited(20, [small, make_lost_gpu(1)], duration_s=2)
    assert isinstance(waited.error, DoesNotFitError)
    assert "the most is 3.0 GiB on GPU 0; lost: GPU 1." in waited.error.found
    waited = Waited(20, [small, make_lost_gpu(1)], [small, with_free(2, 1, memory_total_bytes=9 * GIB)])
    assert isinstance(waited.error, DoesNotFitError)
    assert "can't become free" in waited.error.found


def test_the_only_gpu_that_is_lost_meanwhile_may_come_back() -> None:
    waited = Waited(
        20, [with_free(3, 1)], [make_lost_gpu(1)], [with_free(4, 1)], [make_lost_gpu(1)], [with_free(22, 1)]
    )
    assert waited.found == MemoryFree(1, "GPU-0001", 22 * GIB, 4.0)
    assert waited.told_gib == [3, 0, 4, 0]
    assert waited.told_lost == ["GPU 1 is lost."] * 2
    waited = Waited(20, [with_free(3, 1)], [make_lost_gpu(1)], duration_s=3)
    assert isinstance(waited.error, NoGpuError)
    assert waited.error.found == "GPU 1 is lost."
    assert waited.clock.slept_s == [1, 1, 1]


def test_a_gpu_that_nobody_lets_this_user_read_is_not_waited_for() -> None:
    barred = GpuSample(1, "GPU-0001", None, Problem("no_permission", "Not yours.", "Ask."))
    assert isinstance(Waited(20, [with_free(3, memory_total_bytes=8 * GIB), barred]).error, DoesNotFitError)
    assert isinstance(Waited(20, [with_free(3, 1)], [barred]).error, NoGpuError)


def test_a_gpu_that_does_not_tell_is_no_reason_to_wait_for_ever() -> None:
    silent = make_gpu(memory_free_bytes=None, memory_total_bytes=None)
    waited = Waited(1, [silent])
    assert waited.error is not None
    assert type(waited.error) is DsftError
    assert "tells how much of its memory is free" in waited.error.found
    waited = Waited(1, [silent, with_free(2, 1)])
    assert waited.found is not None
    assert waited.found.gpu_index == 1


def test_with_mig_instances_are_devices_and_the_card_is_none() -> None:
    card = with_free(20, is_mig_enabled=True, migs=(make_mig(0, 4, 10), make_mig(1, 9, 10), make_mig(2, None, None)))
    waited = Waited(5, [card])
    assert waited.found == MemoryFree(0, "MIG-1", 9 * GIB, 0.0)
    waited = Waited(15, [card])
    assert isinstance(waited.error, DoesNotFitError)
    assert "10.00 GiB" in waited.error.found


def test_a_card_with_mig_and_no_instance_runs_no_program() -> None:
    waited = Waited(5, [with_free(20, is_mig_enabled=True)])
    assert waited.error is not None
    assert "MIG be on without an instance" in waited.error.fix


def test_a_gpu_that_is_not_there_is_the_user_s_error() -> None:
    class Refusing:
        def read(self, num_pcie_measurements: int) -> GpuReading:
            raise ConfigError("--gpu 9 is not there.", "There is 0.")

    with pytest.raises(ConfigError):
        wait_free(MonitorConfig(gpus=("9",)), GIB, Refusing(), lambda free_bytes: None, on_lost=lambda problem: None)
