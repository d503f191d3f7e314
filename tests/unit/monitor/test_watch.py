"""The grid of times on which samples are taken, and what the last sample means for the end."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from dsft.core.errors import DsftError, NoGpuError
from dsft.monitor.alerts import Alert, judge
from dsft.monitor.config import MonitorConfig
from dsft.monitor.run import check_alerts_are_known, check_gpus, find_problems, watch
from dsft.monitor.sample import Sample
from tests.monitor_readers import GPU, LOST, NO_DRIVER, FakeClock, ScriptedSampler, make_lost_gpu, make_sample


class Enough(Exception):
    """Ends a watch without an end."""


class Watched:
    """A watch whose reading takes time by a script.

    Attributes:
        taken_s: When each sample was taken, from the start on.
    """

    def __init__(self, read_s: Callable[[int], float] = lambda number: 0.0, most: int = 50, **settings: Any) -> None:
        self.clock = FakeClock()
        self.taken_s: list[float] = []
        start_s = self.clock.now_s

        def before() -> None:
            if len(self.taken_s) == most:
                raise Enough
            self.taken_s.append(self.clock.now_s - start_s)
            self.clock.now_s += read_s(len(self.taken_s))

        self.given: list[Sample] = []
        self.last: Sample | None = None
        sampler = ScriptedSampler((make_sample(GPU) for _ in iter(int, 1)), before)
        try:
            self.last = watch(
                MonitorConfig(**settings), sampler, self.given.append, sleep=self.clock.sleep, clock=self.clock
            )
        except Enough:
            self.last = None
        self.lasted_s = self.clock.now_s - start_s


def test_once_is_one_sample_without_waiting() -> None:
    watched = Watched(is_once=True)
    assert (len(watched.taken_s), watched.clock.slept_s) == (1, [])
    assert watched.given == [watched.last]


@pytest.mark.parametrize("interval_s", [0.1, 0.3, 1.0, 7.0])
@pytest.mark.parametrize("read_s", [0.0, 0.001, 0.09])
def test_the_grid_does_not_drift_and_has_no_point_twice(interval_s: float, read_s: float) -> None:
    watched = Watched(lambda number: read_s, most=2000, interval_s=interval_s)
    assert watched.taken_s == pytest.approx([number * interval_s for number in range(2000)], abs=1e-6)


def test_what_takes_longer_than_the_interval_leaves_points_out_and_stays_on_the_grid() -> None:
    watched = Watched(lambda number: 0.25, most=5, interval_s=0.1)
    assert watched.taken_s == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.2])


def test_after_a_long_pause_there_is_one_sample_and_no_burst() -> None:
    watched = Watched(lambda number: 3600.4 if number == 3 else 0.0, most=6, interval_s=1.0)
    assert watched.taken_s == pytest.approx([0, 1, 2, 3603, 3604, 3605])


@pytest.mark.parametrize(
    ("duration_s", "interval_s", "num_samples"),
    [
        (1.0, 1.0, 1), (3.0, 1.0, 3), (2.5, 1.0, 3), (0.05, 1.0, 1), (0.3, 0.1, 3), (0.7, 0.1, 7), (2.1, 0.7, 3),
        (60.0, 0.1, 600),
    ],
)  # fmt: skip
def test_a_duration_has_its_samples_and_lasts_as_long(duration_s: float, interval_s: float, num_samples: int) -> None:
    watched = Watched(most=10_000, duration_s=duration_s, interval_s=interval_s)
    assert len(watched.taken_s) == num_samples == math.ceil(round(duration_s / interval_s, 6))
    assert watched.lasted_s == pytest.approx(duration_s)
    assert watched.last is watched.given[-1]


def test_a_duration_that_is_over_while_a_sample_is_read_ends_at_once() -> None:
    watched = Watched(lambda number: 9.0, duration_s=5.0)
    assert (watched.taken_s, watched.lasted_s) == ([0.0], 9.0)
    assert watched.clock.slept_s == [0.0]


def test_a_usable_gpu_is_no_problem() -> None:
    check_gpus(make_sample(GPU))
    assert find_problems(make_sample(GPU)) == ()


@pytest.mark.parametrize(
    ("sample", "found", "fix"),
    [
        (make_sample(problem=NO_DRIVER), NO_DRIVER.found, NO_DRIVER.fix),
        (make_sample(GPU, make_lost_gpu(1)), LOST.found, LOST.fix),
        (make_sample(make_lost_gpu(0), make_lost_gpu(1)), f"{LOST.found} {LOST.found}", LOST.fix),
    ],
)
def test_without_a_gpu_or_with_a_lost_one_the_end_is_an_error(sample: Sample, found: str, fix: str) -> None:
    with pytest.raises(NoGpuError) as caught:
        check_gpus(sample)
    assert (caught.value.found, caught.value.fix, caught.value.exit_code) == (found, fix, 5)


def judged(*alerts: Alert) -> Sample:
    sample = make_sample(GPU)
    return make_sample(GPU, alerts=judge(alerts, sample))


def test_limits_that_can_be_judged_are_well_fired_or_not() -> None:
    check_alerts_are_known(judged())
    check_alerts_are_known(judged(Alert("temp", ">", 1), Alert("temp", ">", 99)))


def test_limits_that_can_t_be_judged_are_all_named() -> None:
    with pytest.raises(DsftError) as caught:
        check_alerts_are_known(judged(Alert("temp", ">", 1), Alert("fan", ">", 5), Alert("cpu", ">", 5)))
    assert caught.value.exit_code == 1
    assert caught.value.found == (
        "The alert fan>5 can't be judged: GPU 0 does not tell it. "
        "The alert cpu>5 can't be judged: the host's value is not told."
    )
