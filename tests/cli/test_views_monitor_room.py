"""What the monitor's screen says where there is little room, and where there is much."""

import re
from dataclasses import replace

import pytest

from dsft.cli.views.monitor.layout import render_sample
from dsft.cli.views.monitor.line import Rows
from dsft.cli.views.monitor.state import MonitorState, SortOrder, list_processes
from dsft.monitor.sample import AlertSample, DriverSample, GpuSample, Sample
from tests.cli.monitor_samples import (
    FIRED,
    LOST,
    MACHINES,
    draw,
    draw_text,
    make_gpu,
    make_process,
    make_sample,
    make_state,
)


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


DRIVER = "driver 580.159.04 · CUDA 13.0"


def make_named(sample: Sample) -> MonitorState:
    """Return what the screen of a machine with a name knows."""
    state = MonitorState(1.0, host_name="node-17")
    state.take(sample)
    return state


def test_driver_and_host_name_are_told_where_there_is_room() -> None:
    drawn = draw(make_named(MACHINES["two"]), 100, 40)
    assert drawn[0].endswith(f" {DRIVER} · P2 ──") and "driver" not in "\n".join(drawn[1:])
    assert any(row.startswith("── host node-17 ─") for row in drawn)
    drawn = draw(make_named(MACHINES["eight"]), 120, 24)
    assert any(row.startswith(f"── host node-17 · {DRIVER} ─") for row in drawn)
    brief = draw(make_named(MACHINES["eight"]), 120, 16)
    assert brief[-2].startswith("host · CPU 12 %") and brief[-2].endswith(" · node-17")
    assert draw(make_named(MACHINES["no host"]))[-1].endswith("  node-17 · every 1 s · 03:04:05")
    no_gpu = draw(make_named(replace(MACHINES["no driver"], driver=DriverSample("580.159.04", "13.0"))))
    assert no_gpu[0].endswith(f"─ {DRIVER} ──")


@pytest.mark.parametrize("machine", MACHINES)
def test_driver_and_host_name_take_no_other_words_away(machine: str) -> None:
    sample = MACHINES[machine]
    for width in (20, 34, 40, 55, 66, 80, 100, 131, 200):
        for height in (5, 9, 14, 24, 50):
            named = draw(make_named(sample), width, height)
            plain = draw(make_named(replace(sample, driver=None)), width, height)
            assert len(named) == len(plain)
            for row, without in zip(named, plain, strict=True):
                assert len(row) <= width or not row.isascii()
                words = set(re.findall(r"[^\s─·]+", without))
                assert words <= set(re.findall(r"[^\s─·]+", row)), (width, height)


def test_a_sample_by_itself_names_the_host() -> None:
    text = print_plain(MACHINES["one"], 100)
    assert "── host node-17 ─" in text and DRIVER in text


def print_plain(sample: Sample, width: int) -> str:
    rows = render_sample(sample, width, "node-17")
    assert isinstance(rows, Rows)
    return "\n".join(line.plain for line in rows.lines)


def test_processes_are_sorted_by_their_share_and_told_to_be_graphics_if_they_are() -> None:
    shares: dict[int, float | None] = {1: 5, 2: None, 3: 80}
    kinds = {1: "compute", 2: "graphics", 3: "compute+graphics"}
    processes = tuple(
        replace(make_process(pid), sm_utilization_percent=share, kind=kinds[pid]) for pid, share in shares.items()
    )
    sample = make_sample(gpus=(make_gpu(processes=processes),))
    assert [process.pid for _, process in list_processes(sample, SortOrder.SM)] == [3, 1, 2]
    text = draw_text(sample, 100, 30)
    assert "%  compute+graphics python job_3.py" in text and "N/A  graphics python job_2.py" in text
    assert "%  python job_1.py" in text
    hidden = make_sample(gpus=(make_gpu(processes=(replace(processes[1], is_visible=False),)),))
    assert "graphics not visible from here" in draw_text(hidden, 100, 30)


@pytest.mark.parametrize(("num_samples", "told"), [(1, "1.0 s"), (4, "4.0 s"), (300, "1 min 57 s")])
def test_a_chart_has_a_scale_and_tells_how_much_of_it_was_collected(num_samples: int, told: str) -> None:
    drawn = draw(make_state(MACHINES["one"], num_samples), 200, 50)
    assert [row[77:].strip() for row in drawn if ", last " in row] == [f"memory, last {told}", f"util, last {told}"]
    assert [row[77:82] for row in drawn if row[77:82].strip() in {"100 %", "0 %"}] == ["100 %", "  0 %"] * 2
    memory, util, bandwidth, power = drawn[1:5]
    assert not re.search("[▁-█]", memory[:77] + util[:77])  # the charts show it
    assert re.search("[▁-█]", bandwidth[:77]) and re.search("[▁-█]", power[:77])
