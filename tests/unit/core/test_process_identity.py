"""When a process started, whatever its name, and that one which is over has no start."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dsft.core.process_identity import find_process_place, read_start_ticks


def now_ticks() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("name", ["plain", "a) S 1 (b", ") Z"])
def test_the_start_is_read_whatever_the_program_is_called(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    shutil.copy(shutil.which("sleep") or "", program)
    before = now_ticks()
    with subprocess.Popen([program, "60"]) as process:
        ticks = read_start_ticks(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert read_start_ticks(process.pid) is None  # still in the process table
    assert read_start_ticks(process.pid) is None
    assert ticks is not None and before - 1 <= ticks <= now_ticks()


def test_this_process_has_one_start_by_number_and_by_name() -> None:
    assert read_start_ticks("self") is not None
    assert read_start_ticks("self") == read_start_ticks(os.getpid())
    started = psutil.boot_time() + (read_start_ticks(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")
    assert started == pytest.approx(psutil.Process().create_time(), abs=1)


def test_a_child_has_the_place_of_its_parent() -> None:
    code = "from dsft.core.process_identity import find_process_place; print(find_process_place())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == str(find_process_place())
