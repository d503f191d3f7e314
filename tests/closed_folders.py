"""Folders that may be written into but not read, for tests that may run as root, whom no permission stops."""

import os
from typing import Any

import pytest


def refuse_to_open_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt to open a folder fail as it does without the right to read it."""
    really_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **settings: Any) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(13, "Permission denied")
        return really_open(path, flags, *args, **settings)

    monkeypatch.setattr(os, "open", refuse)
