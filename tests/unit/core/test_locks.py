"""A folder that one process may write into, or several may read: who is refused, and when the lock ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.core.errors import OutputFolderError
from dsft.core.locks import held

HOLD = """
import sys
from pathlib import Path
from dsft.core.locks import held
with held(Path(sys.argv[1]), "Wait."):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputFolderError) as caught, held(tmp_path, "Wait for its end."):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert caught.value.found == f"Another dsft command is writing into {tmp_path} now."
    assert caught.value.fix == "Wait for its end."
    assert caught.value.exit_code == 2
    with held(tmp_path, ""):
        pass


def test_a_lock_ends_with_its_block_and_with_an_error_in_it(tmp_path: Path) -> None:
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    with held(tmp_path, ""), pytest.raises(OutputFolderError), held(tmp_path, ""):
        pass
    with pytest.raises(ValueError, match="x"), held(tmp_path, ""):
        raise ValueError("x")
    with held(tmp_path, ""):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open
    assert not list(tmp_path.iterdir())


def test_folders_are_held_apart_and_a_lock_goes_with_a_renamed_folder(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with held(tmp_path, ""), held(tmp_path / "a", ""), held(tmp_path / "b", ""):
        (tmp_path / "a").rename(tmp_path / "c")
        with pytest.raises(OutputFolderError), held(tmp_path / "c", ""):
            pass


def test_several_may_read_what_one_may_write(tmp_path: Path) -> None:
    with held(tmp_path, "", is_shared=True), held(tmp_path, "", is_shared=True):
        with pytest.raises(OutputFolderError) as caught, held(tmp_path, "Wait."):
            pass
        assert caught.value.found == f"Another dsft command is reading {tmp_path} now."
    with held(tmp_path, ""):
        with pytest.raises(OutputFolderError) as caught, held(tmp_path, "Wait.", is_shared=True):
            pass
        assert caught.value.found == f"Another dsft command is writing into {tmp_path} now."
    with held(tmp_path, ""):
        pass


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_folder_that_goes_between_opening_and_locking_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lock = fcntl.flock

    def rename_and_lock(descriptor: int, operation: int) -> None:
        folder.rename(tmp_path / "elsewhere")
        if is_replaced:
            folder.mkdir()
        lock(descriptor, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", rename_and_lock)
        with pytest.raises(OutputFolderError, match="is writing into"), held(folder, ""):
            pass
    with held(tmp_path / "elsewhere", ""):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    is_used = False
    with held(tmp_path, ""):
        is_used = True
    assert is_used


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), held(tmp_path / "nothing", ""):
        pass
