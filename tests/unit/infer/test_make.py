"""Where Triton keeps what it compiles and what is run: nowhere that others could put something."""

import atexit
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsft.core.paths import triton_cache_dir
from dsft.core.triton_cache import place_triton_cache


@pytest.fixture(autouse=True)
def _no_place_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is put back afterwards
    monkeypatch.delenv("TRITON_CACHE_DIR")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def place() -> tuple[Path, list[str]]:
    notices: list[str] = []
    place_triton_cache(notices.append)
    return Path(os.environ["TRITON_CACHE_DIR"]), notices


def test_it_is_a_folder_of_this_user_alone() -> None:
    assert place() == (triton_cache_dir(), [])
    assert stat.S_IMODE(triton_cache_dir().stat().st_mode) == 0o700


def test_where_the_user_says_so_it_is_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    assert place() == (tmp_path / "own", [])
    assert not triton_cache_dir().exists()


def open_to_all(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def lead_elsewhere(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to("/")


def write_a_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (open_to_all, "others than its owner may write there"),
        (lead_elsewhere, "the folder is a link"),
        (write_a_file, "File exists"),
    ],
)
def test_a_folder_that_is_not_safe_is_told_and_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    at_exit: list[Callable[[], None]] = []

    def register(function: Any, *args: Any, **options: Any) -> None:
        at_exit.append(lambda: function(*args, **options))

    monkeypatch.setattr(atexit, "register", register)
    spoil(triton_cache_dir())
    folder, notices = place()
    assert notices == [f"What Triton compiles is not kept in {triton_cache_dir()}: {reason}."]
    assert folder.parent == tmp_path / "tmp"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert place() == (folder, [])  # one for the process, told once
    (folder / "kernel.so").write_bytes(b"")
    for function in at_exit:
        function()
    assert list((tmp_path / "tmp").iterdir()) == []
