"""What the monitor's screen says where there is little room, and where there is much."""

import re

import pytest

from dsft.monitor.sample import GpuSample
from tests.cli.monitor_samples import LOST, MACHINES, draw, make_gpu, make_sample


def test_gpus_without_room_are_counted_at_any_size() -> None:
    for width in range(20, 201, 3):
        for height in range(2, 14):
            drawn = draw(MACHINES["eight"], width, height)
            shown = [row for row in drawn if "17.9/24.0 GiB" in row]
            counted = [row for row in shown if re.search(rf"GiB.* \+{8 - len(shown)}( more)?$", row)]
            assert counted == ([] if len(shown) == 8 else shown[-1:]), (width, height)
    assert draw(MACHINES["eight"], 80, 6)[4].endswith("  +3 more")
    assert draw(MACHINES["eight"], 40, 7)[5].endswith("17.9/24.0 GiB  +2 more")
    lost = make_sample(gpus=(make_gpu(), GpuSample(1, "GPU-1", "NVIDIA H200", LOST), make_gpu(2)), runs=(), host=None)
    assert draw(lost, 80, 3)[1].endswith("  +1 more")


@pytest.mark.parametrize("width", range(60, 131, 7))
def test_a_full_bar_does_not_touch_what_follows(width: int) -> None:
    gpus = tuple(
        make_gpu(index, gpu_utilization_percent=100.0, memory_free_bytes=0, power_w=450.0) for index in range(2)
    )
    for height in (6, 12, 24, 40):
        for row in draw(make_sample(gpus=gpus), width, height):
            assert not re.search(r"[━╸─]\d|GiB\d", row), row
