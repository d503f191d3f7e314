"""Samples of machines that the monitor's screen is drawn from, and the screen as text."""

import io
import math
from dataclasses import replace
from typing import Any

from rich.console import Console

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.monitor.layout import draw_screen
from dsft.cli.views.monitor.line import Rows
from dsft.cli.views.monitor.state import MonitorState
from dsft.core.units import GIB
from dsft.monitor.sample import (
    AlertSample,
    DriverSample,
    GpuSample,
    HostSample,
    MigSample,
    Problem,
    ProcessSample,
    RunSample,
    Sample,
)

GPU = GpuSample(
    index=0,
    uuid="GPU-0",
    name="NVIDIA GeForce RTX 4090",
    memory_used_bytes=round(17.9 * GIB),
    memory_reserved_bytes=GIB // 2,
    memory_free_bytes=round(5.6 * GIB),
    memory_total_bytes=24 * GIB,
    gpu_utilization_percent=97,
    memory_bandwidth_utilization_percent=64,
    temperature_c=71,
    temperature_slowdown_c=90,
    memory_temperature_c=84,
    power_w=412.3,
    power_limit_w=450,
    performance_state="P2",
    sm_clock_mhz=2520,
    sm_clock_max_mhz=3105,
    memory_clock_mhz=10501,
    memory_clock_max_mhz=10501,
    pcie_generation=4,
    pcie_generation_max=4,
    pcie_width=8,
    pcie_width_max=16,
    pcie_rx_bytes_per_s=1.3 * GIB,
    pcie_tx_bytes_per_s=33 * 1024**2,
    fan_percent=62,
    throttle_reasons=("sw_power_cap",),
    is_ecc_enabled=True,
    ecc_corrected_errors=0,
    ecc_uncorrected_errors=0,
    processes=(
        ProcessSample(4000, "compute", 8 * GIB, 90, "ana", "python -m dsft train --preset rtx4090"),
        ProcessSample(4001, "compute", 3 * GIB, 8, "bob", "python 数据/训练.py --名前 テスト"),
        ProcessSample(1234, "compute", 2 * GIB, 0, "root", "ollama serve", True, 37, "3f2a9c1b2d3e"),
        ProcessSample(777, "compute", 512 * 1024**2, None, None, None, is_visible=False),
    ),
)

RUN = RunSample(
    pid=4000,
    run_name="results_deepseek",
    started="2026-01-01T00:00:00+00:00",
    event_log="/r/events.jsonl",
    stage="training",
    model_name="deepseek-ai/deepseek-coder-6.7b-base",
    device=GPU.name,
    first_step=0,
    step=121,
    num_steps=300,
    epoch=1.21,
    num_epochs=3,
    loss=1.0342,
    recent_losses=tuple(1.7 - 0.01 * step for step in range(64)),
    validation_loss=0.95,
    best_validation_loss=0.94,
    tok_per_s=2331,
    step_s=0.98,
    eta_s=723,
    predicted_memory_bytes=round(18.2 * GIB),
    peak_memory_bytes=round(17.9 * GIB),
    last_event_age_s=0.6,
)

HOST = HostSample(
    num_cpus=32,
    cpu_percent=12.3,
    load_average_1_min=3.2,
    memory_used_bytes=41 * GIB,
    memory_available_bytes=80 * GIB,
    memory_total_bytes=126 * GIB,
    swap_used_bytes=2 * GIB,
    swap_total_bytes=8 * GIB,
    disk_path="/home",
    disk_used_bytes=812 * GIB,
    disk_free_bytes=1000 * GIB,
    disk_total_bytes=1832 * GIB,
    disk_read_bytes_per_s=1.2 * 1024**2,
    disk_write_bytes_per_s=3.4 * 1024,
)

LOST = Problem("gpu_lost", "GPU 1 fell off the bus: the driver lost it.", "Restart the machine; dmesg says why (Xid).")
NO_DRIVER = Problem("no_driver", "There is no NVIDIA driver on this machine.", "Install the driver, then try again.")
SILENT_GPU = GpuSample(0, "GPU-0", None)
"""A GPU that tells nothing."""

FIRED = AlertSample("vram>70", "vram", "%", 0, 76.6, True)


def make_sample(num_gpus: int = 1, **values: Any) -> Sample:
    """Return a sample of a machine with so many GPUs, a run and a host."""
    gpus = tuple(make_gpu(index) for index in range(num_gpus))
    base = {"driver": DriverSample("580.159.04", "13.0"), "gpus": gpus, "host": HOST, "runs": (RUN,)}
    return Sample(time="2026-01-02T03:04:05.678+00:00", **(base | values))


def make_gpu(index: int = 0, **values: Any) -> GpuSample:
    """Return a GPU like `GPU`, those after the first with one process each and idle."""
    others = {} if index == 0 else {"processes": (make_process(100 + index),), "throttle_reasons": ("gpu_idle",)}
    return replace(GPU, **({"index": index, "uuid": f"GPU-{index}"} | others | values))


def make_process(pid: int, memory_gib: float = 0.5) -> ProcessSample:
    """Return a process."""
    return ProcessSample(pid, "compute", round(memory_gib * GIB), 5, "ana", f"python job_{pid}.py")


def make_crowd(count: int) -> tuple[ProcessSample, ...]:
    """Return processes with less memory each."""
    return tuple(make_process(5000 + rank, 20 - 0.5 * rank) for rank in range(count))


MIGS = tuple(
    MigSample(index, f"MIG-{index}", "NVIDIA H200 MIG 1g.18gb", (index + 1) * GIB, 0, (15 - index) * GIB, 16 * GIB,
              (make_process(300 + index),))
    for index in range(3)
)  # fmt: skip

MACHINES = {
    "one": make_sample(),
    "two": make_sample(2),
    "four": make_sample(4),
    "eight": make_sample(8),
    "crowd": make_sample(gpus=(make_gpu(processes=make_crowd(20)),)),
    "lost": make_sample(gpus=(make_gpu(), GpuSample(1, "GPU-1", "NVIDIA H200", LOST))),
    "mig": make_sample(gpus=(make_gpu(is_mig_enabled=True, gpu_utilization_percent=None, processes=(), migs=MIGS),)),
    "no driver": make_sample(0, problem=NO_DRIVER, driver=None),
    "silent": make_sample(gpus=(SILENT_GPU,), host=HostSample(), runs=()),
    "no host": make_sample(host=None),
    "alerts": make_sample(alerts=tuple(replace(FIRED, gpu_index=index) for index in range(6))),
    "runs": make_sample(runs=(RUN, replace(RUN, run_name="訓練 two", stage="loading", step=None), RUN)),
    "troubles": make_sample(
        gpus=(make_gpu(ecc_uncorrected_errors=3, throttle_reasons=("hw_thermal_slowdown", "sw_power_cap")),)
    ),
    "wide": make_sample(gpus=(make_gpu(name="日本語" * 30),), runs=(replace(RUN, run_name="实验" * 60, pid=2**31),)),
}


def make_state(sample: Sample, num_samples: int = 40) -> MonitorState:
    """Return what the screen knows after some samples, the last of which is this one."""
    state = MonitorState(interval_s=1.0)
    for position in range(num_samples - 1):
        gpus = tuple(replace(gpu, gpu_utilization_percent=50 + 50 * math.sin(position)) for gpu in sample.gpus)
        state.take(replace(sample, gpus=gpus))
    state.take(sample)
    return state


def draw(sample: Sample | MonitorState, width: int = 80, height: int = 24) -> list[str]:
    """Return the rows of the screen."""
    state = sample if isinstance(sample, MonitorState) else make_state(sample)
    return [line.plain.rstrip() for line in draw_screen(state, width, height).lines]


def draw_text(sample: Sample | MonitorState, width: int = 80, height: int = 24) -> str:
    """Return the screen as one text."""
    return "\n".join(draw(sample, width, height))


def has_style(sample: Sample, words: str, style: str, width: int = 80, height: int = 24) -> bool:
    """Return whether some part of the screen with these words has this style."""
    lines = draw_screen(make_state(sample), width, height).lines
    return any(words in text and style in drawn for line in lines for text, drawn in line.parts)


def print_screen(sample: Sample, width: int, height: int, encoding: str = "utf-8", **console: Any) -> str:
    """Return what a terminal of an encoding is sent."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    target = Console(file=file, width=width, height=height, highlight=False, markup=False, **console)
    target.print(AsciiFallback(Rows(draw_screen(make_state(sample), width, height).lines)), end="")
    file.seek(0)
    return file.read()
