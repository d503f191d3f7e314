"""The file of a result: whole or as it was, and tried before anything runs."""

from pathlib import Path

import pytest

from dsft.bench.result_file import check_output, write_record
from dsft.core.errors import ConfigError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")
    write_record('{"new": 1}', path)
    assert path.read_text(encoding="utf-8") == '{"new": 1}\n'
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_record("new", path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_a_try_leaves_nothing_and_touches_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("old", encoding="utf-8")
    check_output(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "is a folder"),
        ("nowhere/x.json", "there is no folder"),
        ("/proc/x.json", "/proc/x.json can't be written: "),
        ("/dev/null", "is no regular file"),
        ("x" * 300, "can't be written: File name too long"),
    ],
)
def test_what_can_not_be_written_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match="--output: ") as caught:
        check_output(tmp_path / name)
    assert words in caught.value.found
    assert list(tmp_path.iterdir()) == []
