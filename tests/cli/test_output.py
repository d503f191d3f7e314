"""How messages reach stderr: in whole words on a terminal, one line each elsewhere."""

import io
import re
import sys

import pytest

from dsft.cli.errors import Report
from dsft.cli.output import Output
from dsft.core.errors import ExitCode

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
