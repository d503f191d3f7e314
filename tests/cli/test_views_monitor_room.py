"""What the monitor's screen says where there is little room, and where there is much."""

import re
from dataclasses import replace

import pytest

from dsft.monitor.sample import AlertSample, GpuSample
from tests.cli.monitor_samples import FIRED, LOST, MACHINES, draw, draw_text, make_gpu, make_sample, make_state


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


def test_a_limit_that_can_t_be_judged_has_a_dim_row_as_long_as_it_is_so() -> None:
    unknown = [AlertSample("ecc>0", "ecc", "errors", index, None, None) for index in (0, 1)]
    unknown += [
        AlertSample("cpu>9", "cpu", "%", None, None, None),
        AlertSample("vram>9", "vram", "%", 0, None, None, 2),
    ]
    sample = make_sample(2, alerts=(FIRED, *unknown))
    state = make_state(sample, num_samples=1)
    assert "not tell" not in draw_text(state)  # the first look at a CPU never has a value
    state.take(sample)
    for width, height in ((80, 30), (80, 12), (40, 16)):
        drawn = [row.strip() for row in draw(state, width, height)]
        assert drawn[0].startswith("ALERT")
        assert drawn[1:4] == [
            "ecc>0: GPU 0, 1 do not tell it",
            "cpu>9: host does not tell it",
            "vram>9: GPU 0 MIG 2 does not tell it",
        ]
    state.take(replace(sample, alerts=tuple(replace(alert, value=0.0, is_fired=False) for alert in unknown)))
    assert "not tell" not in draw_text(state)
