"""The peak of the host's memory: in bytes, of this process, mapped pages included."""

import mmap
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.core.host_memory import peak_host_bytes

MIB = 2**20

TELL = "from dsft.core.host_memory import peak_host_bytes; print(peak_host_bytes())"


def ask(before: str) -> int:
    command = [sys.executable, "-c", f"{before}\n{TELL}"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_it_is_in_bytes_and_stays_after_the_memory_is_given_back() -> None:
    small = ask("pass")
    large = ask(f"block = bytearray({200 * MIB}); del block")
    assert 5 * MIB < small < 100 * MIB
    assert large - small == pytest.approx(200 * MIB, abs=8 * MIB)


def test_pages_of_a_mapped_file_count(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (64 * MIB))
    read = f"""
import mmap
with open({str(path)!r}, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    for first in range(0, len(mapped), {mmap.PAGESIZE}):
        mapped[first]
"""
    assert ask(read) - ask("pass") == pytest.approx(64 * MIB, abs=8 * MIB)


def test_what_started_this_program_does_not_count() -> None:
    block = bytearray(300 * MIB)
    assert ask("pass") < 100 * MIB < len(block)


def test_without_proc_the_system_s_own_figure_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **settings: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert peak_host_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
