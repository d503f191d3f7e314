"""Folders and files that are complete or not there: what a failure, a second program and a kill at each step leave."""

import errno
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from dsft.core import staging as module
from dsft.core.errors import WriteError
from dsft.core.staging import discard, flush_files, move_file_in, move_in, put_back, staged, written_beside
from tests.closed_folders import refuse_to_open_folders

FIX = "Do something."
WAYS_TO_MOVE = ("new", "exchange", "two renames")


class Killed(BaseException):
    """Stands for SIGKILL where nothing between the steps catches exceptions or cleans up."""


def make_model(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors", "notes.txt"):
        (folder / name).write_text(f"{name} {content}")
    return folder


def content_of(folder: Path) -> str | None:
    """Return what a folder's model says; None where there is no config.json, so that nothing loads it."""
    if not (folder / "config.json").exists():
        return None
    files = {path.name: path.read_text() for path in folder.iterdir()}
    [content] = {text.partition(" ")[2] for text in files.values()}
    weights = {"model.safetensors.index.json", "a.safetensors", "b.safetensors"}
    assert weights <= files.keys(), f"{folder} loads in part"
    return content


def write_and_fail(target: Path, error: BaseException, before: Callable[[], object] = lambda: None) -> None:
    with staged(target.with_name(".writing"), target, FIX):
        make_model(target.with_name(".writing") / "inner", "x")
        before()
        raise error


def stop_at_step(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Let every change of the file system beyond the first `last` ones be the process's end."""
    steps = 0

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **settings: object) -> object:
            nonlocal steps
            if steps == last:
                raise Killed
            steps += 1
            return change(*args, **settings)

        return run

    for name in ("rename", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(module, "_exchange", counted(module._exchange))


@pytest.mark.parametrize("way", WAYS_TO_MOVE)
def test_after_a_kill_at_any_step_the_old_or_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "two renames":
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    seen, step = set(), 0
    is_done = False
    while not is_done:
        place = tmp_path / str(step)
        target, writing = place / "model", make_model(place / ".model.writing", "new")
        if way != "new":
            make_model(target, "old")
        with monkeypatch.context() as patch:
            stop_at_step(patch, step)
            try:
                move_in(writing, target)
                is_done = True
            except Killed:
                pass
        seen.add(content_of(target))
        assert {content_of(path) for path in place.iterdir()} <= {"old", "new", None}
        put_back(target)
        assert content_of(target) in ({"new"} if is_done else {"old", "new"} if way != "new" else {None, "new"})
        step += 1
    assert sorted(path.name for path in place.iterdir()) == ["model"]
    assert step > 2
    assert seen == {"new": {None, "new"}, "exchange": {"old", "new"}, "two renames": {"old", None, "new"}}[way]


def test_the_next_move_clears_what_a_kill_left_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    target = make_model(tmp_path / "model", "old")
    make_model(tmp_path / ".model.old", "older")
    move_in(make_model(tmp_path / ".model.writing", "new"), target)
    assert content_of(target) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_stepped_aside_goes_where_the_new_one_is_there(tmp_path: Path) -> None:
    target = make_model(tmp_path / "model", "new")
    make_model(tmp_path / ".model.old", "old")
    put_back(target)
    assert content_of(target) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_folders_are_exchanged_by_one_call_where_the_file_system_can(tmp_path: Path) -> None:
    first, second = make_model(tmp_path / "a", "first"), make_model(tmp_path / "b", "second")
    if not module._exchange(first, second):
        pytest.skip("this file system can't exchange")
    assert (content_of(first), content_of(second)) == ("second", "first")


def test_an_exchange_that_fails_is_no_missing_system_call(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        module._exchange(make_model(tmp_path / "a", "first"), tmp_path / "nowhere")


def test_without_the_library_s_function_nothing_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **settings: object())
    assert not module._exchange(make_model(tmp_path / "a", "first"), make_model(tmp_path / "b", "second"))


def test_a_folder_is_emptied_so_that_nothing_loads_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    unlink = os.unlink

    def note(path: str | Path, **settings: object) -> None:
        order.append(Path(path).name)
        unlink(path, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", note)
    discard(make_model(tmp_path / "model", "x"))
    assert order[:2] == ["config.json", "model.safetensors.index.json"]
    assert len(order) == 5
    assert not list(tmp_path.iterdir())


def test_discarding_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    discard(tmp_path / "nothing")
    (tmp_path / "file").touch()
    discard(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_of_a_link_only_the_link_goes(tmp_path: Path) -> None:
    mine = make_model(tmp_path / "mine", "x")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    discard(tmp_path / "link")
    discard(tmp_path / "dangling")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert content_of(mine) == "x"


def test_files_are_on_disk_before_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(Path(f"/proc/self/fd/{number}").readlink().name))
    folder = make_model(tmp_path / "model", "x")
    (folder / "part").mkdir()
    (folder / "part" / "inner").touch()
    flush_files(folder)
    assert sorted(flushed[:-1]) == sorted([*(path.name for path in folder.iterdir() if path.is_file()), "inner"])
    assert flushed[-1] == "model"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_to_whom_the_user_s_new_files_are(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with staged(tmp_path / "w", tmp_path / "t", FIX):
            (tmp_path / "w" / "open").touch()
            (tmp_path / "w" / "closed").touch(mode=0o600)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "w").iterdir()} == {mode}


def test_a_folder_to_write_in_is_empty(tmp_path: Path) -> None:
    make_model(tmp_path / "w", "left by a kill")
    with staged(tmp_path / "w", tmp_path / "t", FIX):
        assert not list((tmp_path / "w").iterdir())
        (tmp_path / "w" / "file").touch()
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["file"]


def test_a_link_in_the_place_of_the_folder_to_write_in_is_replaced(tmp_path: Path) -> None:
    mine = make_model(tmp_path / "mine", "x")
    (tmp_path / "w").symlink_to(mine)
    with staged(tmp_path / "w", tmp_path / "t", FIX):
        (tmp_path / "w" / "file").touch()
    assert not (tmp_path / "w").is_symlink()
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["file"]
    assert content_of(mine) == "x"


def test_folders_and_links_in_a_folder_to_write_in_go_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    mine = make_model(tmp_path / "mine", "x")
    make_model(tmp_path / "w" / "inner", "left by a kill")
    (tmp_path / "w" / "link").symlink_to(mine)
    with staged(tmp_path / "w", tmp_path / "t", FIX):
        assert not list((tmp_path / "w").iterdir())
    assert content_of(mine) == "x"


def test_a_folder_that_is_not_given_stays_as_it_is(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ValueError("of another")

    folder = make_model(tmp_path / "a" / "w", "another's")
    with pytest.raises(ValueError, match="of another"), staged(folder, tmp_path / "t", FIX, refuse):
        pass
    assert content_of(folder) == "another's"


def test_a_folder_is_taken_before_anything_in_it_goes_and_stays_the_same(tmp_path: Path) -> None:
    folder, seen = make_model(tmp_path / "w", "left by a kill"), []
    number = folder.stat().st_ino
    with staged(folder, tmp_path / "t", FIX, lambda: seen.append(content_of(folder))):
        assert seen == ["left by a kill"]
        assert folder.stat().st_ino == number


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), MemoryError(), RuntimeError("x")])
def test_a_failure_leaves_no_folder_and_is_itself(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        write_and_fail(tmp_path / "model", error)
    assert caught.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_files_that_can_t_be_written_are_told_with_place_and_room(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(WriteError) as caught:
        write_and_fail(tmp_path / "model", error)
    assert caught.value.found.startswith(f"{tmp_path / 'model'} can't be written: {error}")
    assert caught.value.found.endswith("GiB free there).")
    assert caught.value.fix == FIX
    assert not list(tmp_path.iterdir())


def test_folders_made_above_it_go_with_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    target = tmp_path / "mine" / "a" / "b" / "model"
    with pytest.raises(ValueError, match="x"):
        write_and_fail(target, ValueError("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())


def test_folders_above_it_stay_where_something_else_has_come(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model"
    with pytest.raises(ValueError, match="x"):
        write_and_fail(target, ValueError("x"), (tmp_path / "a" / "mine.txt").touch)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]


def test_a_place_where_no_folder_can_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="Not a directory"), staged(tmp_path / "file" / "w", tmp_path / "t", FIX):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_ctrl_c_does_not_end_the_cleaning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def remove_for_long(*args: object, **settings: object) -> None:
        signal.raise_signal(signal.SIGINT)
        remove(*args, **settings)  # type: ignore[call-overload]

    with pytest.raises(KeyboardInterrupt):
        write_and_fail(
            tmp_path / "model", KeyboardInterrupt(), lambda: monkeypatch.setattr(shutil, "rmtree", remove_for_long)
        )
    assert not list(tmp_path.iterdir())


def replace_file(target: Path, content: bytes = b"new", **settings: Any) -> None:
    with written_beside(target, (content[:1], content[1:]), **settings) as partial:
        assert partial.parent == target.parent
        assert partial.read_bytes() == content
        move_file_in(partial, target)


def test_a_file_is_the_old_or_the_new_one_and_nothing_stays_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_beside(target, (b"new",)):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_full)
        with pytest.raises(OSError, match="full"):
            replace_file(target)
    with written_beside(target, (b"new",)):
        pass  # nothing moves it
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    replace_file(target)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def raise_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize("mode", [0o640, 0o4755])
def test_a_file_keeps_its_permissions_or_gets_those_that_are_given(tmp_path: Path, mode: int) -> None:
    target = tmp_path / "file"
    before = os.umask(0o027)
    try:
        replace_file(target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.chmod(mode)
    for keeps_all in (False, True):
        replace_file(target, keeps_all=keeps_all)
        assert stat.S_IMODE(target.stat().st_mode) == mode
    replace_file(target, mode=0o600)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_folder_that_can_t_be_opened_does_not_undo_a_file_that_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_open_folders(monkeypatch)
    replace_file(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"
