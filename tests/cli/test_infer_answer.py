"""An answer's way to the screen: colours on a terminal alone, and in every mode the text that came, once."""

import io
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from rich.console import Console

from dsft.cli.infer_answer import AnswerWriter
from dsft.cli.output import Output
from dsft.cli.views import infer_paint
from dsft.cli.views.infer_compare import Section, draw_sections, list_sections, write_sections
from dsft.cli.views.infer_paint import AnswerPainter
from dsft.cli.views.infer_statistics import describe_statistics
from dsft.infer.code_block import FenceReader, Part
from dsft.infer.compare import Comparison
from dsft.infer.decoding.loop import Speculation
from dsft.infer.result import InferResult

ANSWER = """Here, in a line that is longer than narrow terminals are wide, 日本語 and `x`:

   ```python
   @cached
   def f(n: int) -> str:
       '''Doc,

       two lines'''
   \treturn f"{n} 😀" + 'open  # x
   ```
```cuda
__global__ void k(float* a) { a[0] = 2.5f; /* two
lines */ } // end
```
```nolanguage
x
```
```js
const a = "b"; ` c
```"""

BLUE_FUNCTION = "\x1b[1;34mf\x1b[0m"

RESULT = InferResult(
    text=ANSWER,
    num_prompt_tokens=5,
    num_new_tokens=1200,
    stop_reason="end_token",
    time_to_first_token_s=0.5,
    tok_per_s=100.0,
    load_s=2.0,
    peak_memory_bytes=3 * 2**30,
    speculation=None,
    model="./trained_x",
    base="some/base",
    template="instruction",
    seed=None,
    dtype="float32",
    device="cpu",
)


class FakeTerminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def strip_colours(text: str) -> str:
    return re.sub("\x1b\\[[0-9;]*m", "", text)


def cut(text: str, seed: int) -> list[str]:
    source, pieces = random.Random(seed), []
    while text:
        size = source.randint(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def paint(pieces: list[str]) -> str:
    reader, painter = FenceReader(), AnswerPainter()
    shown = [painter.paint(part) for piece in pieces for part in reader.push(piece)]
    return "".join([*shown, *map(painter.paint, reader.flush()), painter.flush()])


@pytest.mark.parametrize("interval_s", [0.0, 1000.0])
def test_colours_leave_the_text_as_it_is_however_it_is_cut(monkeypatch: pytest.MonkeyPatch, interval_s: float) -> None:
    monkeypatch.setattr(infer_paint, "_WITHIN_LINE_INTERVAL_S", interval_s)
    for seed in range(100):
        painted = paint(cut(ANSWER, seed))
        assert strip_colours(painted) == ANSWER
        assert BLUE_FUNCTION in painted


def test_prose_and_code_without_a_language_have_no_colour() -> None:
    assert paint(["Some `code` and\ndef f():\n"]) == "Some `code` and\ndef f():\n"
    assert paint(["```\ndef f(): pass\n"]) == "\x1b[2m```\x1b[0m\ndef f(): pass\n"


def test_no_line_ends_in_a_colour() -> None:
    for line in paint(cut(ANSWER, 0)).splitlines():
        assert line.count("\x1b[") == 2 * line.count("\x1b[0m")


def test_a_block_longer_than_the_window_keeps_text_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    block = "".join(
        f'def f(n):\n    """Doc {n}.\n\nunindented: def f\n    """\n    return {n}\n\n\n' for n in range(200)
    )
    painted = paint(cut(f"```python\n{block}```", 1))
    assert strip_colours(painted) == f"```python\n{block}```"
    assert painted.count(BLUE_FUNCTION) == 200
    string = "```python\n'''\n" + "a line of text\n" * 3000
    assert strip_colours(paint(cut(string, 2))) == string


def test_a_slow_line_is_shown_word_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer_paint, "_WITHIN_LINE_INTERVAL_S", 0.0)
    painter = AnswerPainter()
    shown = [strip_colours(painter.paint(Part("code", piece, "python"))) for piece in ["re", "turn", " x", "yz", "\n"]]
    assert shown == ["", "", "return ", "", "xyz\n"]
    shown = [strip_colours(painter.paint(Part("code", piece, "c"))) for piece in ["// a", " b", "\n"]]
    assert "".join(shown) == "// a b\n"


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write an answer to a stand-in for stdout and return what it got."""

    def run(stream: io.StringIO, pieces: list[str], *, ends: bool = True, **settings: bool) -> str:
        monkeypatch.setattr(sys, "stdout", stream)
        writer = AnswerWriter(Output(), **settings)
        for piece in pieces:
            writer.write(piece)
        writer.end() if ends else writer.break_off()
        return stream.getvalue()

    return run


def test_a_terminal_gets_colours_and_a_pipe_none(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    on_terminal = write(FakeTerminal(), cut(ANSWER, 3))
    assert BLUE_FUNCTION in on_terminal
    assert strip_colours(on_terminal) == ANSWER + "\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert write(io.StringIO(), cut(ANSWER, 3)) == ANSWER + "\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_is_to_have_no_colour_gets_none(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert write(FakeTerminal(), cut(ANSWER, 4)) == ANSWER + "\n"
    assert write(FakeTerminal(), cut(ANSWER, 4), is_code=True).startswith("@cached\n")


def test_control_characters_are_shown_on_a_terminal_and_written_elsewhere(write: Callable[..., str]) -> None:
    answer = "red \x1b[31m\x07\x9b31m\x7f\r\n\tx"
    assert write(FakeTerminal(), [answer]) == "red ␛[31m␇�31m�\n\tx\n"
    assert write(io.StringIO(), [answer]) == answer + "\n"


@pytest.mark.parametrize("stream", [FakeTerminal, io.StringIO])
def test_only_the_code_of_the_first_block_is_written(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    code = "@cached\ndef f(n: int) -> str:\n    '''Doc,\n\n    two lines'''\n\treturn f\"{n} 😀\" + 'open  # x\n"
    for seed in range(20):
        shown = write(stream(), cut(ANSWER, seed), is_code=True)
        assert strip_colours(shown) == code
        assert (BLUE_FUNCTION in shown) == (stream is FakeTerminal)
    assert write(stream(), ["x = ", "1\n\n"], is_code=True) == "x = 1\n"


def test_an_answer_that_is_broken_off_leaves_no_colour_behind(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert write(FakeTerminal(), ["So"], ends=False) == "So\n"
    assert write(FakeTerminal(), ["```py\n'''a b"], ends=False).endswith("a b\x1b[0m\n")
    assert write(FakeTerminal(), [], ends=False) == ""
    assert write(io.StringIO(), ["x = 1"], ends=False, is_code=True) == ""


def test_statistics_tell_everything_once() -> None:
    assert describe_statistics(RESULT) == (
        "1,200 tokens, ended by itself; first token after 0.50 s; 100.0 tok/s; loaded in 2.0 s; peak memory 3.0 GiB"
    )
    settings = vars(RESULT) | {
        "speculation": Speculation(num_drafted=60, num_accepted=40, num_passes=20),
        "seed": 7,
        "device": "cuda",
        "tok_per_s": None,
    }
    assert describe_statistics(InferResult(**settings)) == (
        "1,200 tokens, ended by itself; first token after 0.50 s; 40 of 60 drafted tokens taken; loaded in 2.0 s; "
        "peak GPU memory 3.0 GiB; seed 7"
    )
    assert "loaded" not in describe_statistics(RESULT, with_process=False)


@pytest.mark.parametrize("width", [40, 98, 99, 150])
def test_a_comparison_keeps_both_texts_at_every_width(width: int) -> None:
    comparison = Comparison(
        InferResult(**(vars(RESULT) | {"text": "```python\n  x = 1\n```\nleft 日本\n"})),
        InferResult(**(vars(RESULT) | {"text": "right\n\n" + "z" * 120})),
    )
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(draw_sections(list_sections(comparison), lambda text: text))
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert re.search("\x1b\\[36[;0-9]*m1", drawn)
    lines = strip_colours(drawn).splitlines()
    assert lines[0].startswith("Base alone some/base")
    is_wide = width >= 99
    assert ("With adapter ./trained_x" in lines[0]) == is_wide
    assert "".join(lines).count("z") == 120
    half = (width - 3) // 2 if is_wide else width
    left = [line[:half].rstrip() for line in lines]
    assert left[2:5] == ["```python", "  x = 1", "```"]
    assert all(len(line) <= width for line in lines)


def test_a_comparison_in_a_pipe_is_plain() -> None:
    comparison = Comparison(
        InferResult(**(vars(RESULT) | {"text": "left\n\n"})), InferResult(**(vars(RESULT) | {"text": "right"}))
    )
    assert write_sections(list_sections(comparison)) == (
        "=== Base alone: some/base ===\nleft\n\n=== With adapter: ./trained_x ===\nright"
    )


def test_half_a_comparison_is_drawn_over_the_whole_width() -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(draw_sections([Section("base", "m", "x" * 180)], lambda text: text))
    assert isinstance(console.file, io.StringIO)
    title, _, body = console.file.getvalue().splitlines()
    assert (title, body.rstrip()) == ("Base alone m", "x" * 180)


DRIVER = """
import pathlib, sys, time
import dsft.infer.run
from dsft.cli.app import main
def say(config, prompt, on_text, on_notice):
    for piece in ["Here:\\n```python\\n", "def f(n):\\n", "    return '''n", " and"]:
        on_text(piece)
    pathlib.Path("said").touch()
    time.sleep(60)
dsft.infer.run.run_infer = say
sys.exit(main(["infer", "x"]))
"""


def test_ctrl_c_in_a_coloured_line_leaves_the_terminal_in_its_colours(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {"TERM": "xterm-256color", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    terminal = pexpect.spawn(
        sys.executable, [str(tmp_path / "driver.py")], encoding="utf-8", timeout=60, env=environment, cwd=str(tmp_path)
    )
    terminal.expect_exact("\x1b[1;34mf\x1b[0m(n):")
    while not (tmp_path / "said").exists():  # all that comes before the signal
        time.sleep(0.01)
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130
    assert terminal.before.endswith("\r\n")
    shown = terminal.before.replace("^C", "")
    assert "Traceback" not in shown
    assert strip_colours(shown).strip() == "return '''n and"
    assert shown.count("\x1b[") == 2 * shown.count("\x1b[0m") - 1  # one more, for what may have been cut
