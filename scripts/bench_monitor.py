"""Measure what monitors cost: CPU, memory and time to the first frame, each in a terminal of its own.

python scripts/bench_monitor.py --seconds 60 --out docs/benchmarks/monitor.json

Needs an NVIDIA GPU. Monitors that are not installed (nvitop, gpustat) are left out and named. Before the measurement
`--processes` programs take a CUDA context each, so that every monitor has the same table to fill.
"""

import argparse
import json
import os
import platform
import pty
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fcntl import ioctl
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COLUMNS, LINES = 120, 40
WARM_UP_S = 5.0
FIRST_FRAMES = 7

COMMANDS = {
    "dsft monitor": [sys.executable, "-m", "dsft", "monitor"],
    "dsft monitor --no-cpu": [sys.executable, "-m", "dsft", "monitor", "--no-cpu"],
    "nvitop": [sys.executable, "-m", "nvitop", "--interval", "1"],
    "gpustat": [sys.executable, "-m", "gpustat", "--interval", "1", "--show-all"],
}
PACKAGES = {"nvitop": "nvitop", "gpustat": "gpustat"}

HOLD_CONTEXT = """
import ctypes, sys, time
cuda = ctypes.CDLL("libcuda.so.1")
context, device, memory = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_void_p()
assert cuda.cuInit(0) == 0
assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(64 << 20)) == 0
print("ready", flush=True)
time.sleep(100000)
"""


@dataclass(frozen=True)
class Cost:
    """What one monitor took.

    Attributes:
        cpu_percent: CPU time of the process over the time measured, of one core.
        rss_bytes: Resident set at the end; what libraries map from files included.
        rss_anonymous_bytes: The part of it that is no page of a file.
        first_frame_s: From its start to the first frame with the GPU's name, median.
        first_frames_s: Each of them.
    """

    command: str
    version: str
    cpu_percent: float
    rss_bytes: int
    rss_anonymous_bytes: int
    first_frame_s: float
    first_frames_s: list[float]


def main() -> None:
    """Measure one monitor after the other and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long each is measured (default: 60)")
    parser.add_argument("--processes", type=int, default=20, help="programs that use the GPU meanwhile (default: 20)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured, by turns (default: 1)")
    parser.add_argument("--only", action="append", choices=COMMANDS, help="measure this one; may be repeated")
    parser.add_argument("--out", type=Path, help="file for the figures")
    options = parser.parse_args()

    driver, gpu_name = read_gpu()
    asked = {name: COMMANDS[name] for name in options.only or COMMANDS}
    present = {name: command for name, command in asked.items() if find_version(name) is not None}
    for name in asked.keys() - present.keys():
        print(f"{name} is not installed and left out", file=sys.stderr)
    costs: list[Cost] = []
    with gpu_processes(options.processes):
        for _ in range(options.rounds):
            for name, command in present.items():
                # Its last word, as some monitors leave the maker out.
                costs.append(measure(name, command, options.seconds, gpu_name.split()[-1]))
                print(json.dumps(asdict(costs[-1])), file=sys.stderr)
    record = {
        "gpu": gpu_name,
        "driver": driver,
        "python": platform.python_version(),
        "num_cpus": os.cpu_count(),
        "num_gpu_processes": options.processes,
        "seconds": options.seconds,
        "terminal": f"{COLUMNS}x{LINES}",
        "interval_s": 1.0,
        "costs": [asdict(cost) for cost in costs],
    }
    text = json.dumps(record, indent=2) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text, end="")


def find_version(name: str) -> str | None:
    """Return a monitor's version, or None where it is not installed."""
    if name not in PACKAGES:
        from dsft import __version__

        return __version__
    try:
        return version(PACKAGES[name])
    except PackageNotFoundError:
        return None


def read_gpu() -> tuple[str, str]:
    """Return the driver's version and the name of GPU 0."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion()), str(
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        )
    finally:
        pynvml.nvmlShutdown()


@contextmanager
def gpu_processes(count: int) -> Iterator[None]:
    """Keep so many programs with a CUDA context each while the context is open."""
    children = [
        subprocess.Popen([sys.executable, "-c", HOLD_CONTEXT], stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline().strip() != "ready":
                sys.exit("a program that was to use the GPU could not")
        yield
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def measure(name: str, command: list[str], seconds: float, mark: str) -> Cost:
    """Measure a monitor."""
    first_frames_s = []
    for _ in range(FIRST_FRAMES):
        with running(command) as (_, terminal):
            first_frames_s.append(wait_for(terminal, mark))
    with running(command) as (pid, terminal):
        wait_for(terminal, mark)
        drain(terminal, WARM_UP_S)
        started_s, before_s = time.monotonic(), cpu_s(pid)
        drain(terminal, seconds)
        cpu_percent = 100 * (cpu_s(pid) - before_s) / (time.monotonic() - started_s)
        status = read_status(pid)
    return Cost(
        command=name,
        version=find_version(name) or "",
        cpu_percent=round(cpu_percent, 3),
        rss_bytes=status["VmRSS"],
        rss_anonymous_bytes=status["RssAnon"],
        first_frame_s=round(statistics.median(first_frames_s), 3),
        first_frames_s=[round(value, 3) for value in first_frames_s],
    )


@contextmanager
def running(command: list[str]) -> Iterator[tuple[int, int]]:
    """Run a command in a terminal of its own; gives its PID and the terminal's other end."""
    terminal, inside = pty.openpty()
    ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment.pop("COLUMNS", None)
    child = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, env=environment, start_new_session=True
    )
    os.close(inside)
    try:
        yield child.pid, terminal
    finally:
        child.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + 5
        while child.poll() is None and time.monotonic() < deadline_s:
            drain(terminal, 0.05)
        child.kill()
        child.wait()
        os.close(terminal)


def wait_for(terminal: int, mark: str) -> float:
    """Return the seconds until a text has been written to a terminal."""
    started_s, seen = time.monotonic(), b""
    while time.monotonic() - started_s < 60:
        seen += read_some(terminal, 1.0)
        if mark.encode() in seen:
            return time.monotonic() - started_s
    sys.exit(f"no frame with {mark!r} in 60 s; the last that came: {seen[-2000:]!r}")


def drain(terminal: int, seconds: float) -> None:
    """Read what is written to a terminal, for so long."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        read_some(terminal, left_s)


def read_some(terminal: int, timeout_s: float) -> bytes:
    """Return what a terminal has, or nothing in time."""
    if not select.select([terminal], [], [], timeout_s)[0]:
        return b""
    try:
        return os.read(terminal, 65536)
    except OSError:  # the program has ended
        time.sleep(0.01)
        return b""


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, its ended children included."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def read_status(pid: int) -> dict[str, int]:
    """Return the sizes that the kernel tells of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


if __name__ == "__main__":
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia").exists():
        sys.exit("there is no NVIDIA driver")
    main()
