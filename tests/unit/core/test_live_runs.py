"""The files of training runs that go on: who is shown, whose file is removed, and that nothing stops a training."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dsft.core.live_runs import read_live_runs, registered
from dsft.core.paths import live_runs_dir

REGISTER = """
import os, sys, time
from pathlib import Path
from dsft.core.live_runs import registered
with registered("a run", Path("out/events.jsonl"), Path("out"), print):
    if "fork" in sys.argv:
        child = os.fork()
        if child == 0:
            time.sleep(60)
        print("child", child, flush=True)
    if "leave" in sys.argv and os.fork() == 0:
        sys.exit()  # a child that leaves the block as a process of its own
    if "leave" in sys.argv:
        os.wait()
    print("registered", flush=True)
    sys.stdin.read()
"""


@contextmanager
def running(cwd: Path, *flags: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    command = [sys.executable, "-c", REGISTER, *flags]
    with subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip()]
        while lines[-1] != "registered":
            assert lines[-1], "it ended before it was registered"
            lines.append(process.stdout.readline().strip())
        yield process, lines
        if process.poll() is None:
            process.kill()


@contextmanager
def in_this_process(folder: Path, told: list[str] | None = None) -> Iterator[None]:
    def tell(text: str) -> None:
        assert told is not None, text
        told.append(text)

    with registered("mine", folder / "events.jsonl", folder, tell):
        yield


def files() -> list[Path]:
    return sorted(live_runs_dir().iterdir())


def leave_file(**changes: Any) -> Path:
    """Leave the file of a run that is over, with some of it changed."""
    with in_this_process(Path("/nowhere")):
        record = json.loads(files()[0].read_text())
    path = live_runs_dir() / f"{len(files())}.json"
    path.write_text(json.dumps(record | changes))
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_run_is_there_as_long_as_its_block(tmp_path: Path) -> None:
    before = time.time()
    with in_this_process(tmp_path):
        [run] = read_live_runs(live_runs_dir())
        [path] = files()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(live_runs_dir().stat().st_mode) == 0o700
        assert json.loads(path.read_text())["schema"] == 1
    assert files() == []
    assert (run.run_name, run.pid) == ("mine", os.getpid())
    assert (run.event_log, run.output_dir) == (str(tmp_path / "events.jsonl"), str(tmp_path))
    assert run.has_lock and run.boot_id and run.pid_namespace
    created = datetime.fromisoformat(run.registered).timestamp()
    assert before - 0.01 <= created <= time.time()
    import psutil

    started = datetime.fromisoformat(run.started).timestamp()
    assert started == pytest.approx(psutil.Process().create_time(), abs=1)


def test_an_error_or_a_signal_in_the_block_removes_it_too(tmp_path: Path) -> None:
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), in_this_process(tmp_path):
            raise error
        assert files() == []
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open


def test_paths_are_absolute_and_runs_come_oldest_first(tmp_path: Path) -> None:
    with in_this_process(tmp_path), running(tmp_path) as (first, _), running(tmp_path) as (second, _):
        mine, *others = read_live_runs(live_runs_dir())
        assert mine.pid == os.getpid()
        assert [run.pid for run in others] == [first.pid, second.pid]
        assert others[0].event_log == str(tmp_path / "out" / "events.jsonl")


def test_a_killed_run_is_gone_at_once_and_its_file_too(tmp_path: Path) -> None:
    with running(tmp_path) as (process, _):
        assert len(read_live_runs(live_runs_dir())) == 1
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, but still in the process table
        assert Path(f"/proc/{process.pid}").exists()
        assert read_live_runs(live_runs_dir()) == ()
    assert files() == []


def test_children_that_outlive_a_killed_run_do_not_keep_it_alive(tmp_path: Path) -> None:
    with running(tmp_path, "fork") as (process, lines):
        child = int(next(line for line in lines if line.startswith("child")).split()[1])
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        try:
            assert read_live_runs(live_runs_dir()) == ()
            assert len(files()) == 1  # its lock is still held, by the child
        finally:
            os.kill(child, signal.SIGKILL)
        deadline_s = time.monotonic() + 10
        while files() and time.monotonic() < deadline_s:
            assert read_live_runs(live_runs_dir()) == ()
            time.sleep(0.02)
    assert files() == []


def test_a_forked_child_that_leaves_the_block_takes_nothing_away(tmp_path: Path) -> None:
    with running(tmp_path, "leave") as (process, _):
        assert [run.pid for run in read_live_runs(live_runs_dir())] == [process.pid]


def test_another_process_of_the_same_number_is_not_the_run() -> None:
    path = leave_file(start_ticks=1)
    with locked(path):
        assert read_live_runs(live_runs_dir()) == ()
        assert path.exists()
    assert read_live_runs(live_runs_dir()) == ()
    assert not path.exists()


def test_a_run_that_is_over_in_a_process_that_goes_on_is_not_shown() -> None:
    path = leave_file()
    assert read_live_runs(live_runs_dir()) == ()
    assert path.exists()  # a file server may have forgotten the lock of a run that goes on


@pytest.mark.parametrize(
    ("changes", "is_held", "is_shown", "is_kept"),
    [
        ({"boot_id": "another"}, True, False, True),
        ({"boot_id": "another"}, False, False, False),
        ({"boot_id": "another", "host_name": "elsewhere"}, False, False, True),
        ({"boot_id": "another", "has_lock": False}, False, False, True),
        ({"pid_namespace": 1}, True, True, True),
        ({"pid_namespace": 1}, False, False, False),
        ({"pid_namespace": None}, True, True, True),
        ({"pid_namespace": 1, "has_lock": False}, False, False, True),
        ({"has_lock": False}, False, True, True),
        ({"has_lock": False, "start_ticks": 1}, False, False, False),
    ],
)
def test_other_machines_containers_and_file_systems_without_locks(
    changes: dict[str, Any], is_held: bool, is_shown: bool, is_kept: bool
) -> None:
    path = leave_file(**changes)
    if is_held:
        with locked(path):
            shown = read_live_runs(live_runs_dir())
    else:
        shown = read_live_runs(live_runs_dir())
    assert len(shown) == is_shown
    assert path.exists() == is_kept


def test_without_locks_pid_and_start_time_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with in_this_process(tmp_path):
        [run] = read_live_runs(live_runs_dir())
        assert not run.has_lock
        dead = leave_file(start_ticks=1)
        assert read_live_runs(live_runs_dir()) == (run,)
        assert not dead.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"schema": 1}',
        b'{"schema": 2}',
    ],
    ids=["empty", "half", "list", "null", "no text", "deep", "no fields", "newer"],
)
def test_damaged_and_foreign_files_are_passed_over_and_stay(content: bytes, tmp_path: Path) -> None:
    with in_this_process(tmp_path):
        path = live_runs_dir() / "foreign.json"
        path.write_bytes(content)
        assert [run.run_name for run in read_live_runs(live_runs_dir())] == ["mine"]
    assert files() == [path]


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": "1"},
        {"pid": "1"},
        {"pid": True},
        {"start_ticks": 1.5},
        {"event_log": "relative/events.jsonl"},
        {"event_log": "/nul\0/events.jsonl"},
        {"run_name": None},
        {"boot_id": 3},
    ],
    ids=str,
)
def test_records_of_another_kind_are_passed_over_and_stay(changes: dict[str, Any]) -> None:
    path = leave_file(has_lock=False)
    assert len(read_live_runs(live_runs_dir())) == 1
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert read_live_runs(live_runs_dir()) == ()
    assert path.exists()


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    real = leave_file(has_lock=False)
    elsewhere = tmp_path / "elsewhere.json"
    real.rename(elsewhere)
    (live_runs_dir() / "link.json").symlink_to(elsewhere)
    (live_runs_dir() / "folder.json").mkdir()
    os.mkfifo(live_runs_dir() / "pipe.json")
    assert read_live_runs(live_runs_dir()) == ()
    assert len(files()) == 3


def test_no_folder_is_no_runs(tmp_path: Path) -> None:
    assert read_live_runs(tmp_path / "none") == ()


def put_link(folder: Path, target: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to(target)


def put_file(folder: Path, target: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def put_file_above(folder: Path, target: Path) -> None:
    folder.parent.parent.mkdir(parents=True)
    folder.parent.write_text("")


@pytest.mark.parametrize("spoil", [put_link, put_file, put_file_above])
def test_a_folder_that_can_t_be_written_is_told_once_and_stops_nothing(spoil: Any, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    spoil(live_runs_dir(), target)
    told: list[str] = []
    with in_this_process(tmp_path, told):
        pass
    [text] = told
    assert "dsft monitor" in text
    assert str(live_runs_dir()) in text
    assert "XDG_STATE_HOME" in text
    assert list(target.iterdir()) == []


def test_a_folder_others_could_read_is_closed(tmp_path: Path) -> None:
    live_runs_dir().mkdir(parents=True, mode=0o755)
    live_runs_dir().chmod(0o755)
    with in_this_process(tmp_path):
        assert stat.S_IMODE(live_runs_dir().stat().st_mode) == 0o700


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(file: int, content: bytes) -> int:
        return len(content) // 2

    monkeypatch.setattr(os, "write", write_half)
    told: list[str] = []
    with in_this_process(tmp_path, told):
        assert files() == []
    assert len(told) == 1


def test_what_a_process_left_while_it_wrote_goes_after_an_hour() -> None:
    live_runs_dir().mkdir(parents=True)
    old, young, used = (live_runs_dir() / f".writing-{name}.json" for name in ("old", "young", "used"))
    for path in (old, young, used):
        path.write_text("{")
    for path in (old, used):
        os.utime(path, (time.time() - 4000, time.time() - 4000))
    with locked(used):
        assert read_live_runs(live_runs_dir()) == ()
    assert files() == sorted([young, used])


def test_no_reader_ever_removes_the_file_of_a_live_run(tmp_path: Path) -> None:
    is_over = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not is_over.is_set():
            seen.append(len(read_live_runs(live_runs_dir())))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(200):
            with in_this_process(tmp_path):
                assert len(files()) == 1
                assert len(read_live_runs(live_runs_dir())) == 1
    finally:
        is_over.set()
        for reader in readers:
            reader.join()
    assert 1 in seen
    assert files() == []


def test_it_loads_the_standard_library_alone() -> None:
    code = "import sys, dsft.core.live_runs; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    foreign = set(loaded.stdout.split()) - set(sys.stdlib_module_names) - {"__main__", "dsft"}
    assert not {name for name in foreign if not name.startswith("_")}
