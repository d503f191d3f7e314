"""Checkpoints that are complete or not there, whatever is killed or damaged."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsft.core.errors import WriteError
from dsft.train.checkpoint import (
    MANIFEST,
    find_damage,
    find_newest_valid,
    list_checkpoints,
    remove_leftovers,
    remove_old_checkpoints,
    replace_folder,
    set_aside_damaged,
    write_checkpoint,
)

FILES = {"adapter_model.safetensors": b"weights" * 100, "optimizer.pt": b"moments" * 100, "trainer_state.json": b"{}"}


def write_files(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


def ignore(path: Path, damage: str) -> None:
    raise AssertionError(f"{path} was called damaged: {damage}")


def test_a_written_checkpoint_is_whole(tmp_path: Path):
    path = write_checkpoint(tmp_path, 12, write_files)
    assert path == tmp_path / "checkpoint-12"
    assert find_damage(path) is None
    assert {file.name for file in path.iterdir()} == {*FILES, MANIFEST}


@pytest.mark.parametrize("fail_after", range(len(FILES) + 1))
def test_a_failure_at_any_file_leaves_the_older_checkpoint_newest(tmp_path: Path, fail_after: int):
    write_checkpoint(tmp_path, 1, write_files)

    def fail(folder: Path) -> None:
        for count, (name, content) in enumerate(FILES.items()):
            if count == fail_after:
                raise OSError("disk full")
            (folder / name).write_bytes(content)
        raise OSError("disk full")

    with pytest.raises(WriteError, match=r"checkpoint-2 can't be written: disk full \(.* GiB free there\)"):
        write_checkpoint(tmp_path, 2, fail)
    assert find_newest_valid(tmp_path, ignore) == tmp_path / "checkpoint-1"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["removed", "flipped", "truncated"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path: Path, name: str, damage: str):
    write_checkpoint(tmp_path, 1, write_files)
    newest = write_checkpoint(tmp_path, 2, write_files)
    content = bytearray((newest / name).read_bytes())
    if damage == "removed":
        (newest / name).unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
    else:
        (newest / name).write_bytes(content[:-1])
    told: list[tuple[Path, str]] = []
    found = find_newest_valid(tmp_path, lambda path, phrase: told.append((path, phrase)))
    assert found == tmp_path / "checkpoint-1"
    assert told[0][0] == newest
    # a flipped bit in the manifest shows as another file's mismatch, or as damage of the manifest
    assert name in told[0][1] or name == MANIFEST


def test_a_damaged_checkpoint_set_aside_counts_no_more(tmp_path: Path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, write_files)
    aside = set_aside_damaged(tmp_path / "checkpoint-2")
    assert aside.is_dir()
    remove_old_checkpoints(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2.damaged"}


def test_no_checkpoint_is_no_error(tmp_path: Path):
    assert find_newest_valid(tmp_path / "missing", ignore) is None


def test_steps_are_ordered_as_numbers_and_the_newest_are_kept(tmp_path: Path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step, write_files)
    (tmp_path / "checkpoint-final").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    remove_old_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10"]
    assert (tmp_path / "checkpoint-final").exists()


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path):
    folder = replace_folder(tmp_path / "adapter-best", write_files)
    folder.rename(tmp_path / ".adapter-best.old")
    remove_leftovers(tmp_path)
    assert find_damage(tmp_path / "adapter-best") is None


WRITER = """
import sys
from pathlib import Path
from dsft.train.checkpoint import remove_old_checkpoints, replace_folder, write_checkpoint
folder = Path(sys.argv[1])
def write_files(target):
    for index in range(6):
        (target / f"file-{index}").write_bytes(bytes([index]) * 50_000)
for step in range(1, 100_000):
    write_checkpoint(folder, step, write_files)
    remove_old_checkpoints(folder, 2)
    replace_folder(folder / "adapter-best", write_files)
    print(step, flush=True)
"""


def test_kill_dash_nine_never_leaves_a_broken_newest_checkpoint(tmp_path: Path):
    """A process that writes checkpoints without pause is killed at random moments."""
    choose = random.Random(7)
    for round_number in range(12):
        folder = tmp_path / str(round_number)
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(choose.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            done = int([first, *process.stdout.read().split()][-1])
        remove_leftovers(folder)
        newest = find_newest_valid(folder, ignore)
        assert newest is not None
        assert int(newest.name.rpartition("-")[2]) >= done
        assert find_damage(folder / "adapter-best") is None
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
