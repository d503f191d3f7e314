"""Training runs that are going on: each keeps a file under the user's state folder, by which others find it.

Only the standard library: `dsft monitor` reads these files every second and must stay small.
"""

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from dsft.core.errors import describe_os_error
from dsft.core.notices import Notify
from dsft.core.paths import live_runs_dir
from dsft.core.private_folder import make_private_folder
from dsft.core.process_identity import find_process_place, read_start_ticks
from dsft.core.signals import held_signals

SCHEMA = 1
_SUFFIX = ".json"
_PARTIAL_PREFIX = ".writing-"
_PARTIAL_KEPT_S = 3600.0
"""After that a file that is still being written belongs to a process that was killed there."""

_MOST_BYTES = 65_536
_FIRST_TOO_LARGE = 2**63
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe put there must not stop the reader


@dataclass(frozen=True)
class LiveRun:
    """A training run, as its file tells it.

    Attributes:
        run_name: Its name.
        event_log: Absolute path of its event log, which may not be there yet.
        output_dir: Absolute path of its output folder.
        pid: Its process.
        start_ticks: When that started, in clock ticks since boot; unlike a time of day it never moves.
        started: The same as ISO 8601, UTC.
        registered: When the run began in it; what an event log tells of this run is no older.
        host_name: The machine's name.
        boot_id: The machine's boot; None where the system does not tell.
        pid_namespace: Where the PID counts; None where /proc shows those of another.
        has_lock: Whether the process could lock its file: some network file systems have no locks.
    """

    run_name: str
    event_log: str
    output_dir: str
    pid: int
    start_ticks: int
    started: str
    registered: str
    host_name: str
    boot_id: str | None
    pid_namespace: int | None
    has_lock: bool


class _Lock(Enum):
    HELD = 1
    FREE = 2
    UNKNOWN = 3


class _Verdict(Enum):
    LIVE = 1
    DEAD = 2
    ELSEWHERE = 3
    """Of another machine, or not to be told from here: neither shown nor removed."""


@contextmanager
def registered(run_name: str, event_log: Path, output_dir: Path, notify: Notify) -> Iterator[None]:
    """Let others see that a training run goes on in this process, until the block ends.

    The lock on the file ends with the process, however that ends, so that a file which stays behind is known as such.

    Args:
        run_name: The run's name.
        event_log: Where it will tell its events.
        output_dir: Its output folder.
        notify: Told if the file can't be written, which is no reason to stop a training.
    """
    file: _RunFile | None = None
    try:
        with held_signals():
            try:
                file = _RunFile(run_name, event_log, output_dir)
            except OSError as error:
                notify(
                    f"`dsft monitor` will not show this run, as no file of it can be written into {live_runs_dir()}: "
                    f"{describe_os_error(error)}. Let that be a folder of this user's alone, or choose another place "
                    "by XDG_STATE_HOME."
                )
            except RuntimeError as error:  # the user has no home folder
                notify(
                    f"`dsft monitor` will not show this run: {error}. Choose a place for its file by XDG_STATE_HOME."
                )
        yield
    finally:
        if file is not None:
            with held_signals():
                file.remove()


def read_live_runs(folder: Path) -> tuple[LiveRun, ...]:
    """Return the runs that are going on on this machine, oldest first; files of dead ones are removed.

    Args:
        folder: `live_runs_dir()`. What else lies in it is passed over.
    """
    try:
        descriptor = os.open(folder, _OPEN_FOLDER)
    except OSError:
        return ()
    try:
        runs = [_look_at(descriptor, name) for name in os.listdir(descriptor)]  # noqa: PTH208  # a descriptor
    except OSError:
        return ()
    finally:
        os.close(descriptor)
    return tuple(sorted((run for run in runs if run is not None), key=lambda run: (run.started, run.pid)))


class _RunFile:
    """The file of this process's run, locked as long as it is open.

    Children that are forked share the lock, and keep it a moment longer where this process is killed; then its PID
    says that it is gone.
    """

    def __init__(self, run_name: str, event_log: Path, output_dir: Path) -> None:
        folder = live_runs_dir()
        make_private_folder(folder)
        self._owner = os.getpid()
        self._name = os.urandom(8).hex() + _SUFFIX
        self._folder = os.open(folder, _OPEN_FOLDER)
        try:
            os.fchmod(self._folder, 0o700)
            self._file = self._write(run_name, event_log, output_dir)
        except BaseException:
            os.close(self._folder)
            raise

    def _write(self, run_name: str, event_log: Path, output_dir: Path) -> int:
        partial = _PARTIAL_PREFIX + self._name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(partial, flags, 0o600, dir_fd=self._folder)
        try:
            run = _describe(run_name, event_log, output_dir, has_lock=_take_lock(file))
            content = json.dumps({"schema": SCHEMA, **asdict(run)}).encode()
            if os.write(file, content) != len(content):
                raise OSError("the disk is full")
            # Under the name that others look for it appears whole and locked.
            os.rename(partial, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial, dir_fd=self._folder)
            os.close(file)
            raise
        return file

    def remove(self) -> None:
        """Remove the file, then let the lock go; does nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        with suppress(OSError):
            os.unlink(self._name, dir_fd=self._folder)
        os.close(self._file)
        os.close(self._folder)


def _describe(run_name: str, event_log: Path, output_dir: Path, *, has_lock: bool) -> LiveRun:
    start_ticks = read_start_ticks("self")
    if start_ticks is None:
        raise OSError("/proc does not tell when this process started")
    now = datetime.now(UTC)
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    here = find_process_place()
    return LiveRun(
        run_name=run_name,
        event_log=str(event_log.absolute()),
        output_dir=str(output_dir.absolute()),
        pid=os.getpid(),
        start_ticks=start_ticks,
        started=(now - timedelta(seconds=max(0.0, age_s))).isoformat(timespec="milliseconds"),
        registered=now.isoformat(timespec="milliseconds"),
        host_name=here.host_name,
        boot_id=here.boot_id,
        pid_namespace=here.pid_namespace,
        has_lock=has_lock,
    )


def _take_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _look_at(folder: int, name: str) -> LiveRun | None:
    is_partial = name.startswith(_PARTIAL_PREFIX)
    if not is_partial and not name.endswith(_SUFFIX):
        return None
    try:
        file = os.open(name, _OPEN_FILE, dir_fd=folder)
    except OSError:
        return None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if is_partial:
            if time.time() - status.st_mtime > _PARTIAL_KEPT_S and _probe_lock(file) is _Lock.FREE:
                _remove(folder, name, file)
            return None
        run = _parse(os.read(file, _MOST_BYTES))
        if run is None:
            return None
        lock = _probe_lock(file) if run.has_lock else _Lock.UNKNOWN
        verdict = _judge(run, lock)
        # Data loading children may outlive a process that was killed, and its lock with them: then by a later look.
        if verdict is _Verdict.DEAD and lock is not _Lock.HELD:
            _remove(folder, name, file)
        return run if verdict is _Verdict.LIVE else None
    except OSError:
        return None
    finally:
        os.close(file)


def _parse(content: bytes) -> LiveRun | None:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return None
    values: dict[str, Any] = {field.name: record.get(field.name) for field in fields(LiveRun)}
    if not all(type(value) in _KINDS[name] for name, value in values.items()):
        return None
    if any(isinstance(value, int) and not 0 <= value < _FIRST_TOO_LARGE for value in values.values()):
        return None
    run = LiveRun(**values)
    paths = (run.event_log, run.output_dir)
    return run if all(path.startswith("/") and "\0" not in path for path in paths) else None


_KINDS: dict[str, tuple[type, ...]] = {
    field.name: {
        "boot_id": (str, type(None)),
        "pid_namespace": (int, type(None)),
        "pid": (int,),
        "start_ticks": (int,),
        "has_lock": (bool,),
    }.get(field.name, (str,))
    for field in fields(LiveRun)
}


def _probe_lock(file: int) -> _Lock:
    try:
        # Shared, so that two that look at once don't take each other for the run.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.HELD
    except OSError:
        return _Lock.UNKNOWN
    return _Lock.FREE


def _judge(run: LiveRun, lock: _Lock) -> _Verdict:
    here = find_process_place()
    if run.boot_id != here.boot_id:
        # Locks of some network file systems are not seen by other machines: a free one says nothing about their runs.
        is_earlier_boot = lock is _Lock.FREE and run.host_name == here.host_name
        return _Verdict.DEAD if is_earlier_boot else _Verdict.ELSEWHERE
    if run.pid_namespace is None or run.pid_namespace != here.pid_namespace:
        return {_Lock.HELD: _Verdict.LIVE, _Lock.FREE: _Verdict.DEAD, _Lock.UNKNOWN: _Verdict.ELSEWHERE}[lock]
    if read_start_ticks(run.pid) != run.start_ticks:
        return _Verdict.DEAD
    # With a free lock the process goes on, but its run is over, or a file server forgot it: no reason to remove it.
    return _Verdict.ELSEWHERE if lock is _Lock.FREE else _Verdict.LIVE


def _remove(folder: int, name: str, file: int) -> None:
    """Remove a file if it is still the one that was opened; no run ever takes the name of another."""
    with suppress(OSError):
        if os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(file)):
            os.unlink(name, dir_fd=folder)
