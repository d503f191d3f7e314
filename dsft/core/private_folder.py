"""Folders whose files are trusted, run or nobody else's: they are this user's alone to write into.

They stand in a folder of dsft's own, that of its cache or its state, which is closed to others as well.
"""

import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private_folder(folder: Path) -> None:
    """Make a private folder where there is none, and check it.

    Args:
        folder: It stands in dsft's cache or state folder itself.

    Raises:
        OSError: It can't be made, or others could put something into it.
    """
    # The rights of parents that are made here go by the umask, whatever mode is given.
    folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private_folder(folder)


def check_private_folder(folder: Path) -> None:
    """Refuse a folder that others could put something into.

    Args:
        folder: It stands in dsft's cache or state folder itself.

    Raises:
        FileNotFoundError: There is none.
        OSError: It, or the folder it is in, belongs to another user; or it is a link, or its rights let others write.
    """
    _close_to_others(folder.parent)
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise OSError("the folder is a link")
    _check_owner(status, folder)
    if status.st_mode & _OTHERS_WRITE:
        raise OSError("others than its owner may write there")


def check_own_file(descriptor: int) -> None:
    """Refuse an open file that another user has put there.

    Raises:
        OSError: It is so.
    """
    if os.fstat(descriptor).st_uid != os.geteuid():
        raise OSError("the file belongs to another user")


def _close_to_others(parent: Path) -> None:
    """Take away the right of others to exchange what stands in dsft's cache or state folder.

    Many systems give it to the user's group wherever a folder is made (umask 002), and this one may have been made for
    data that needs no such care. What others have put there meanwhile is theirs, and refused for that.
    """
    _check_owner(parent.lstat(), parent)  # it may be a link, to a larger disk, if it is the user's
    status = parent.stat()
    _check_owner(status, parent)
    if status.st_mode & _OTHERS_WRITE:
        parent.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)


def _check_owner(status: os.stat_result, folder: Path) -> None:
    if status.st_uid != os.geteuid():
        raise OSError(f"{folder} belongs to another user")
