"""How messages reach stderr: in whole words on a terminal, one line each elsewhere; and what a full disk ends."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.cli.errors import Report
from dsft.cli.output import Output
from dsft.core.errors import ExitCode
from tests.scripted_models import write_scripted_model

FULL = Path("/dev/full")
"""A device of Linux that is always full."""

PATH = "./a-folder-with-a-name/that-is-longer-than-the-line-is-wide/adapter_config.json"
TEXT = f"Words of up to some letters in number stand before {PATH} and behind it, in both kinds of message."


class FakeTerminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def tell(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", stream)
    output = Output()
    output.note(TEXT)
    output.warn(TEXT)
    output.fail(Report("X", TEXT, TEXT, ExitCode.FAILURE))
    output.note("two\n\n  lines")
    return re.sub("\x1b\\[[0-9;]*m", "", stream.getvalue())


def test_a_terminal_gets_lines_of_whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    told = tell(monkeypatch, FakeTerminal())
    lines = told.splitlines()
    assert [line for line in lines if len(line) > 40] == [PATH] * 4
    assert " ".join(lines[:-3]) == f"{TEXT} warning: {TEXT} error: {TEXT} hint: {TEXT}"
    assert len(lines) > 16
    assert lines[-3:] == ["two", "", "  lines"]


def test_a_label_alone_is_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", stream)
    Output().warn("x y")
    assert stream.getvalue() == "\x1b[33mwarning: \x1b[0mx y\n"


def test_elsewhere_each_message_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes no terminal of a pipe
    told = tell(monkeypatch, io.StringIO())
    assert told == f"{TEXT}\nwarning: {TEXT}\nerror: {TEXT}\nhint: {TEXT}\ntwo\n\n  lines\n"


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_message_that_can_t_be_written_ends_nothing_and_takes_no_later_one_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FULL.open("w") as stream, (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", stream)
        output = Output(use_json=True)
        output.warn("lost")
        output.fail(Report("X", "found", "fix", ExitCode.WRONG_INPUT))
        assert os.fstat(stream.fileno()).st_rdev == FULL.stat().st_rdev
        stream.flush()  # nothing is left that would fail
        os.dup2(log.fileno(), stream.fileno())  # as if there were room again
        output.warn("kept")
    assert (tmp_path / "log").read_text().endswith("warning: kept\n")
    assert json.loads(capsys.readouterr().out)["error"]["found"] == "found"


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("redirection", "code", "out", "told"),
    [
        ("> /dev/full", 1, "", "error: stdout: No space left on device."),
        ("--json > /dev/full", 1, "", "error: stdout: No space left on device."),
        ("2> /dev/full", 0, "Hi\n", ""),
        ("--template poem --json 2> /dev/full", 2, '{"error": ', ""),
    ],
)
def test_a_full_disk_is_told_of_the_data_and_survived_by_messages(
    tmp_path: Path, redirection: str, code: int, out: str, told: str
) -> None:
    write_scripted_model(tmp_path / "model", "Hi")
    command = f'"{sys.executable}" -m dsft infer x --model "{tmp_path / "model"}" --device cpu {redirection}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code
    assert done.stdout.startswith(out)
    assert (told in done.stderr.splitlines()) if told else (done.stderr == "")
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("encoding", "written"), [("iso8859-1", b"H\xe9y \\u4f60\\U0001f600\n"), ("ascii", b"H\\xe9y ")]
)
def test_characters_that_become_escapes_are_warned_of_once(tmp_path: Path, encoding: str, written: bytes) -> None:
    write_scripted_model(tmp_path / "model", "Héy 你😀")
    command = [sys.executable, "-m", "dsft", "infer", "x", "--model", str(tmp_path / "model"), "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, "--quiet"], capture_output=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0
    assert done.stdout.startswith(written)
    (warning,) = done.stderr.decode().splitlines()
    assert warning.startswith("warning: stdout is written in ")
    assert f" {encoding}, " in warning
    done = subprocess.run([*command, "--json"], capture_output=True, timeout=120, check=False, env=environment)
    assert (json.loads(done.stdout)["text"], done.stderr) == ("Héy 你😀", b"")


def test_utf_8_and_text_that_the_encoding_has_are_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for encoding, text in (("utf-8", "é你😀"), ("latin-1", "é")):
        with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            Output().write(text)
    assert capsys.readouterr().err == ""
