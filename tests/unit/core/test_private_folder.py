"""Private folders: made for this user alone, and refused where others could have put something into them."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsft.core.private_folder import check_own_file, check_private_folder, make_private_folder


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    earlier = os.umask(0o002)  # what most systems with a group for each user have
    yield
    os.umask(earlier)


def mode_of(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_a_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "dsft" / "triton"
    make_private_folder(folder)
    assert mode_of(folder) == 0o700
    assert mode_of(folder.parent) == 0o755
    make_private_folder(folder)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o777])
def test_a_folder_that_others_may_write_into_is_refused_and_left_as_it_is(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "dsft" / "triton"
    make_private_folder(folder)
    folder.chmod(mode)
    for use in (make_private_folder, check_private_folder):
        with pytest.raises(OSError, match="others than its owner may write there"):
            use(folder)
    assert mode_of(folder) == mode


@pytest.mark.parametrize("use", [make_private_folder, check_private_folder])
def test_a_cache_folder_that_others_may_write_into_is_closed_to_them(
    tmp_path: Path, use: Callable[[Path], None]
) -> None:
    folder = tmp_path / "dsft" / "triton"
    make_private_folder(folder)
    folder.parent.chmod(0o2777)
    use(folder)
    assert mode_of(folder.parent) == 0o2755


def test_folders_and_files_of_another_user_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dsft" / "triton"
    make_private_folder(folder)
    own = os.geteuid()
    with (folder / "kernel.so").open("wb") as file:
        check_own_file(file.fileno())
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
        with pytest.raises(OSError, match="the file belongs to another user"):
            check_own_file(file.fileno())
    with pytest.raises(OSError, match="dsft belongs to another user"):
        check_private_folder(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_that_another_user_made_in_an_own_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dsft" / "triton"
    make_private_folder(folder)
    os.chown(folder, os.geteuid() + 1, -1)
    with pytest.raises(OSError, match="triton belongs to another user"):
        make_private_folder(folder)


def test_a_link_in_the_cache_folder_is_refused_and_the_cache_folder_may_be_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "dsft").symlink_to(disk)
    make_private_folder(tmp_path / "dsft" / "nf4")
    assert (disk / "nf4").is_dir()
    assert mode_of(disk) == 0o755
    (tmp_path / "dsft" / "triton").symlink_to(disk / "nf4")
    with pytest.raises(OSError, match="the folder is a link"):
        make_private_folder(tmp_path / "dsft" / "triton")


def test_there_may_be_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_private_folder(tmp_path / "dsft" / "nf4")
    assert list(tmp_path.iterdir()) == []
