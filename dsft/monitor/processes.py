"""Whose process a PID of the driver is, what it runs, and in which container; from /proc alone."""

import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path

from dsft.core.process_identity import ProcessStat, read_process_stat
from dsft.monitor.command_line import clean_text, describe_command

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO of Linux: the namespace in which the driver counts."""

_MAX_COMMAND_BYTES = 16 * 1024
_STATUS_BYTES = 4096
_CGROUP_BYTES = 16 * 1024

_CONTAINER_ID_CHARS = 12
_CONTAINERS = re.compile(
    r"(?:docker|libpod|cri-containerd|crio|containerd|kubepods[^:\n]*)[-/:](?P<id>[0-9a-f]{64})"
    r"|/lxc(?:\.payload)?[./](?P<name>[^/\n]{1,64})"
)


@dataclass(frozen=True)
class ProcessFacts:
    """What is known of a process; the fields are those of `ProcessSample`."""

    user: str | None = None
    command: str | None = None
    is_visible: bool = True
    container_pid: int | None = None
    container_id: str | None = None


_HIDDEN = ProcessFacts(is_visible=False)


class ProcessReader:
    """Tells what the PIDs are that the driver names; what it has found out once it keeps while the process lives.

    Args:
        proc: Where the system tells of processes.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._known: dict[int, tuple[ProcessStat, ProcessFacts]] = {}
        self._read_pids: set[int] = set()
        self._users: dict[int, str] = {}
        self._is_drivers_count = _is_initial_namespace(proc)

    def read(self, pid: int) -> ProcessFacts:
        """Return what the system tells of a process; what it does not tell is None.

        Args:
            pid: As the driver tells it.
        """
        self._read_pids.add(pid)
        folder = f"{self._proc}/{pid}"
        stat = self._read_stat(pid)
        if stat is None:
            return _HIDDEN
        known = self._known.get(pid)
        if known is not None and known[0] == stat:
            return known[1]
        facts = self._find_out(folder, stat)
        if facts.is_visible:
            self._known[pid] = (stat, facts)
        return facts

    def forget_others(self) -> None:
        """Forget the processes that were not read since the last call."""
        self._known = {pid: known for pid, known in self._known.items() if pid in self._read_pids}
        self._read_pids.clear()

    def _read_stat(self, pid: int) -> ProcessStat | None:
        try:
            return read_process_stat(pid, str(self._proc))
        except OSError:  # others' processes may be hidden
            return None

    def _find_out(self, folder: str, stat: ProcessStat) -> ProcessFacts:
        if not self._is_drivers_count and not _has_gpu_open(folder):
            return _HIDDEN  # the driver counts for the host: a process of this number here is another one
        status = _read_text(f"{folder}/status", _STATUS_BYTES)
        pids = _find_field(status, "NSpid:")
        return ProcessFacts(
            user=self._name_user(_find_field(status, "Uid:")),
            command=_read_command(folder, stat),
            container_pid=int(pids[-1]) if len(pids) > 1 else None,
            container_id=_find_container(_read_text(f"{folder}/cgroup", _CGROUP_BYTES)),
        )

    def _name_user(self, ids: list[str]) -> str | None:
        """Return the name of the effective one of the ids of a user."""
        if len(ids) < 2:
            return None
        user_id = int(ids[1])
        if user_id not in self._users:
            try:
                name = pwd.getpwuid(user_id).pw_name
            except KeyError:
                name = str(user_id)
            self._users[user_id] = clean_text(name)
        return self._users[user_id]


def _is_initial_namespace(proc: Path) -> bool:
    try:
        return str((proc / "self/ns/pid").readlink()) == _INITIAL_PID_NAMESPACE
    except OSError:
        return False


def _read_text(path: str, max_bytes: int) -> str:
    """Return the beginning of a file, or nothing where it can't be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, max_bytes).decode(errors="replace")
    except OSError:  # the process ended just now
        return ""
    finally:
        os.close(descriptor)


def _find_field(status: str, name: str) -> list[str]:
    for line in status.splitlines():
        if line.startswith(name):
            return line.split()[1:]
    return []


def _read_command(folder: str, stat: ProcessStat) -> str | None:
    if stat.has_ended:
        return f"{clean_text(stat.name)} (zombie)"
    text = _read_text(f"{folder}/cmdline", _MAX_COMMAND_BYTES)
    if not text:
        return None
    arguments = text.rstrip("\0").split("\0")
    if len(text.encode()) >= _MAX_COMMAND_BYTES and len(arguments) > 1:
        arguments[-1:] = ["…"]  # half a secret has no form that could be known
    try:
        return describe_command(arguments)
    except Exception:  # arguments are another's to choose: whatever they hold, the sample goes on without them
        return None


def _find_container(cgroup: str) -> str | None:
    found = _CONTAINERS.search(cgroup)
    if found is None:
        return None
    return found["id"][:_CONTAINER_ID_CHARS] if found["id"] else clean_text(found["name"])


def _has_gpu_open(folder: str) -> bool:
    """Return whether a process is known to have a GPU's device open."""
    try:
        with os.scandir(f"{folder}/fd") as entries:
            return any(_is_gpu(entry.path) for entry in entries)
    except OSError:
        return False


def _is_gpu(link: str) -> bool:
    try:
        target = str(Path(link).readlink())
    except OSError:
        return False
    return target.startswith("/dev/nvidia") or target == "/dev/dxg"
