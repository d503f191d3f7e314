"""Which process a number stands for: numbers are given again, and count apart on every machine and in every container.

Only the standard library: `dsft monitor` asks this every second and must stay small.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_ENDED_STATES = (b"Z", b"X", b"x")
_MAX_STAT_BYTES = 4096


@dataclass(frozen=True)
class ProcessPlace:
    """Where the numbers of processes mean what they mean to this one.

    Attributes:
        host_name: The machine's name.
        boot_id: The machine's boot; None where the system does not tell.
        pid_namespace: Inode of the PID namespace; None where /proc shows the numbers of another.
    """

    host_name: str
    boot_id: str | None
    pid_namespace: int | None


@dataclass(frozen=True)
class ProcessStat:
    """What tells one process from another of the same number, and from itself before it began another program.

    Attributes:
        start_ticks: When it started, in clock ticks since boot.
        name: Of the program; the system cuts it after 15 bytes.
        has_ended: Whether it is over, and its parent has not asked how.
    """

    start_ticks: int
    name: str
    has_ended: bool


@cache
def find_process_place() -> ProcessPlace:
    """Return the place of this process."""
    boot_id = pid_namespace = None
    with suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        # /proc may have been mounted in another namespace and count otherwise.
        if str(Path("/proc/self").readlink()) == str(os.getpid()):
            pid_namespace = Path("/proc/self/ns/pid").stat().st_ino
    return ProcessPlace(os.uname().nodename, boot_id, pid_namespace)


def read_process_stat(pid: int | str, proc: str = "/proc") -> ProcessStat | None:
    """Return what the system tells of a process, or None where there is none of this number.

    Args:
        pid: Its number, or "self".
        proc: Where the system tells of processes.

    Raises:
        OSError: That can't be told.
    """
    try:
        with open(f"{proc}/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123  # a Path would cost as much again
            content = file.read(_MAX_STAT_BYTES)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name, which may hold spaces and parentheses; the third is the state.
    head, _, tail = content.rpartition(b")")
    state_and_rest = tail.split()
    if len(state_and_rest) < 20 or not state_and_rest[19].isdigit():
        return None
    name = head.partition(b"(")[2].decode(errors="replace")
    return ProcessStat(int(state_and_rest[19]), name, state_and_rest[0] in _ENDED_STATES)  # field 22 of proc(5)


def read_start_ticks(pid: int | str) -> int | None:
    """Return when a process started, in clock ticks since boot, or None where it is over.

    Args:
        pid: Its number, or "self".

    Raises:
        OSError: That can't be told.
    """
    stat = read_process_stat(pid)
    return None if stat is None or stat.has_ended else stat.start_ticks
