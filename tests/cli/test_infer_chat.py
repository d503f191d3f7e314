"""`dsft infer --chat` without a terminal, and what of its input is a question, a command or a part of one."""

import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from dsft.cli.app import main
from dsft.cli.errors import Terminated
from dsft.cli.infer_chat_input import Command, Unit, parse_unit, read_unit
from dsft.infer.session import Session
from tests.scripted_models import write_scripted_model

NAMES = ("/help", "/save", "/system")


def read_units(*lines: str) -> list[Unit]:
    rest = iter(lines)

    def read_line(is_continued: bool) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    def read_all() -> Iterator[Unit]:
        while True:
            try:
                yield read_unit(read_line)
            except EOFError:
                return

    return list(read_all())


@pytest.mark.parametrize(
    ("lines", "units"),
    [
        (("a", "b"), [Unit("a"), Unit("b")]),
        (("a\\", "b\\", "c", "d"), [Unit("a\nb\nc"), Unit("d")]),
        (("a\\",), [Unit("a")]),
        (('"""', "a", "", "/b\\", '"""', "c"), [Unit("a\n\n/b\\", is_block=True), Unit("c")]),
        (('""" ', "a"), [Unit("a", is_block=True)]),
        (("a\n\nb\n", "c"), [Unit("a\n\nb"), Unit("c")]),
        (('"""\na\n"""', "c"), [Unit("a", is_block=True), Unit("c")]),
        (('"""\nDoc.\n"""\nimport os', "c"), [Unit('"""\nDoc.\n"""\nimport os'), Unit("c")]),
        (('"""', "a\nb\n", "c", 'd\n"""', "e"), [Unit("a\nb\n\nc\nd", is_block=True), Unit("e")]),
        (('x = """',), [Unit('x = """')]),
    ],
)
def test_lines_that_belong_together(lines: tuple[str, ...], units: list[Unit]) -> None:
    assert read_units(*lines) == units


def test_the_reader_is_told_whether_a_line_goes_on() -> None:
    told: list[bool] = []
    lines = iter(["a\\", "b", '"""', '"""'])

    def read_line(is_continued: bool) -> str:
        told.append(is_continued)
        return next(lines)

    read_unit(read_line)
    read_unit(read_line)
    assert told == [False, True, False, True]


@pytest.mark.parametrize(
    ("unit", "meaning"),
    [
        (Unit("What?"), "What?"),
        (Unit("/save  my file.jsonl "), Command("/save", "my file.jsonl")),
        (Unit("/help"), Command("/help", "")),
        (Unit("/usr/bin is what?"), Command("/usr/bin", "is what?")),
        (Unit("//usr/bin is what?"), "/usr/bin is what?"),
        (Unit("/system Be brief.\nBe kind."), Command("/system", "Be brief.\nBe kind.")),
        (Unit("// a comment\nint x;"), "// a comment\nint x;"),
        (Unit("/* a comment */\nint x;"), "/* a comment */\nint x;"),
        (Unit("/help", is_block=True), "/help"),
        (Unit("/"), Command("/", "")),
    ],
)
def test_commands_and_questions(unit: Unit, meaning: Command | str) -> None:
    assert parse_unit(unit, NAMES) == meaning


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_scripted_model(folder / "greeting", "Hey, du!")
    write_scripted_model(folder / "endless", "abc def\n")
    write_scripted_model(folder / "short", "Hey, du!", max_position_embeddings=128)
    return folder


Talk = Callable[..., int]


@pytest.fixture
def talk(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Talk]:
    monkeypatch.chdir(tmp_path)
    transformers_logging.disable_progress_bar()

    def run(stdin: str | bytes, *options: str, model: str = "greeting") -> int:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        arguments = ["infer", "--chat", "--device", "cpu", "--template", "instruction", *options]
        return main([*arguments, "--model", str(models / model)])

    yield run
    transformers_logging.enable_progress_bar()


Capture = pytest.CaptureFixture[str]


def test_each_line_of_a_pipe_is_a_question(talk: Talk, capsys: Capture) -> None:
    assert talk("One?\n\nTwo?\r\nThree?") == 0
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n" * 3
    assert ">>>" not in captured.err
    statistics = captured.err.splitlines()
    assert len(statistics) == 3
    assert all(line.startswith("9 tokens, ended by itself; first token after ") for line in statistics)
    assert "loaded" not in captured.err


def test_no_question_is_no_error(talk: Talk, capsys: Capture) -> None:
    assert talk("") == 0
    assert capsys.readouterr() == ("", "")


def test_quiet_leaves_answers_errors_and_what_was_asked_for(talk: Talk, capsys: Capture) -> None:
    assert talk("One?\n/undo\n/system Be brief.\n/system\n/nonsense\n/help\n", "--quiet") == 2
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n"
    brief, error, hint, first_command, *_ = captured.err.splitlines()
    assert brief == "Be brief."
    assert error == "error: There is no command /nonsense."
    assert hint.startswith("hint: /help lists them")
    assert first_command.startswith("/help")


def test_commands_say_what_they_did(talk: Talk, capsys: Capture) -> None:
    told = "One?\n/save x.jsonl\nTwo?\n/save\n/undo\n/reset\n/system\n/system Be kind.\n/system -\n/quit\nnever asked\n"
    assert talk(told) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n" * 2
    notes = [line for line in captured.err.splitlines() if "tok/s" not in line]
    assert notes == [
        "Saved 1 question with answers in x.jsonl: one row more. `dsft train --dataset x.jsonl` reads it.",
        "Saved 2 questions with answers in x.jsonl: the row saved before is written anew. "
        "`dsft train --dataset x.jsonl` reads it.",
        "Dropped the last question and its answer; 1 question left.",
        "A new conversation.",
        "There is no system text.",
        "A new system text from here on.",
        "No system text from here on.",
    ]


@pytest.mark.parametrize("name", ["/exit", "/bye"])
def test_names_of_other_programs_are_known(talk: Talk, capsys: Capture, name: str) -> None:
    assert talk(f"One?\n/clear\n{name}\nnever asked\n") == 0
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n"
    assert "A new conversation." in captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save", "/save needs the name of a file"),
        ("/save x.jsonl", "There is nothing to save"),
        ("/undo", "The conversation is empty"),
        ("/retry", "The conversation is empty"),
        ("/reset now", "/reset takes nothing, but 'now' follows"),
        ("/rest", "There is no command /rest"),
        ("x" * 200, "reads at most 128"),
    ],
)
def test_an_error_does_not_end_the_chat_but_is_its_exit_code(
    talk: Talk, capsys: Capture, line: str, message: str
) -> None:
    assert talk(f"{line}\nWell?\n", model="short") == 2
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n"
    assert message in captured.err


def test_a_line_that_is_no_text_is_told_and_the_next_one_answered(talk: Talk, capsys: Capture) -> None:
    assert talk(b"ab\xff\nWell?\n") == 2
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n"
    assert "The line on stdin is not valid UTF-8 at byte 3." in captured.err


@pytest.mark.parametrize("unit", [b'"""\na\n\xff\n/b\n"""', b"a\\\n\xff\\\nb", b"\xff\\\nb", b"a\\\n\xff"])
def test_lines_that_belong_to_one_that_is_no_text_are_no_questions(talk: Talk, capsys: Capture, unit: bytes) -> None:
    assert talk(unit + b"\nWell?\n") == 2
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n"
    assert captured.err.count("error: ") == captured.err.count("not valid UTF-8 at byte 1.") == 1


def test_an_answer_asked_for_again_is_told_to_be_the_same(talk: Talk, capsys: Capture) -> None:
    assert talk("One?\n/retry\n") == 0
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n" * 2
    assert "The answer will be the same" in captured.err
    assert talk("One?\n/retry\n", "--temperature", "0.1") == 0
    assert "the same" not in capsys.readouterr().err


def test_saving_cut_answers_is_warned_of(talk: Talk, capsys: Capture) -> None:
    assert talk("One?\n/save x.jsonl\n", "--max-new-tokens", "2") == 0
    assert "warning: 1 answer was stopped before the end" in capsys.readouterr().err


def test_an_answer_that_says_nothing_is_told(talk: Talk, capsys: Capture) -> None:
    assert talk("One?\n", "--stop", "H") == 0
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "The answer says nothing; the question is not kept." in captured.err


def test_undo_says_whether_it_dropped_an_answer(talk: Talk, capsys: Capture) -> None:
    assert talk(f"One?\n{'x' * 200}\n/undo\n/undo\n", model="short") == 2
    dropped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Dropped")]
    assert dropped == [
        "Dropped the question that got no answer; 1 question left.",
        "Dropped the last question and its answer; 0 questions left.",
    ]


@pytest.mark.parametrize("template", ["text", "fim"])
def test_a_template_without_turns_is_refused(talk: Talk, capsys: Capture, template: str) -> None:
    assert talk("One?\n", "--template", template) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: A chat takes a template that can write several turns" in captured.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_chat_without_a_terminal(models: Path, number: signal.Signals, code: int) -> None:
    options = ["--model", str(models / "endless"), "--device", "cpu", "--max-new-tokens", "3900", "--quiet"]
    command = [sys.executable, "-m", "dsft", "infer", "--chat", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()  # and is not closed: a question is answered before the next one comes
        assert process.stdout.readline() == b"abc def\n"
        process.send_signal(number)
        rest, error = process.stdout.read(), process.stderr.read()
    assert process.returncode == code
    assert rest.endswith(b"\n")
    assert b"Traceback" not in error


def test_a_closed_pipe_ends_it_quietly(models: Path) -> None:
    options = ["--model", str(models / "endless"), "--device", "cpu", "--max-new-tokens", "3900", "--quiet"]
    command = [sys.executable, "-m", "dsft", "infer", "--chat", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"go\nand again\n")
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (0, b"")


class Typist:
    """Stands for someone at a terminal: types lines, or presses keys that raise."""

    is_interactive = True

    def __init__(self, *acts: str | BaseException) -> None:
        self._acts = iter((*acts, EOFError()))
        self.typed = False

    def read(self, is_continued: bool) -> str:
        act = next(self._acts)
        if isinstance(act, BaseException):
            self.typed = bool(act.args)
            raise act
        return act

    def has_typed(self) -> bool:
        return self.typed


CTRL_C, CTRL_C_BEHIND_TEXT = KeyboardInterrupt(), KeyboardInterrupt("abc")


@pytest.mark.parametrize(
    ("acts", "code", "num_warnings"),
    [
        ([], 0, 0),
        ([CTRL_C], 0, 1),
        ([CTRL_C, CTRL_C], 130, 1),
        ([CTRL_C_BEHIND_TEXT, CTRL_C], 130, 1),
        ([CTRL_C, CTRL_C_BEHIND_TEXT], 0, 2),
        ([CTRL_C, "/undo", CTRL_C], 0, 2),
        (["a\\", CTRL_C, "/nonsense"], 0, 1),
        ([Terminated("SIGTERM")], 143, 0),
    ],
)
def test_ctrl_c_at_the_prompt_warns_once(
    talk: Talk,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    acts: list[str | BaseException],
    code: int,
    num_warnings: int,
) -> None:
    monkeypatch.setattr("dsft.cli.infer_chat.open_lines", lambda *_, **__: Typist(*acts))
    assert talk("") == code
    captured = capsys.readouterr()
    assert captured.out == ""  # what was begun before Ctrl-C was not asked
    assert captured.err.count("Ctrl-C once more") == num_warnings


def test_ctrl_c_in_an_answer_gives_the_prompt_back(
    talk: Talk, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsft.cli.infer_chat.open_lines", lambda *_, **__: Typist("One?", "Two?"))
    answer = Session.answer
    calls: list[int] = []

    def answer_once(self: Session, *args: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return answer(self, *args)

    monkeypatch.setattr(Session, "answer", answer_once)
    assert talk("") == 0
    captured = capsys.readouterr()
    assert captured.out == "Hey, du!\n"
    assert "Stopped before the answer began; the question is not kept." in captured.err
