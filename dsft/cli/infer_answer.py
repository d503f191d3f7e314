"""One prompt answered, and the way of an answer to stdout: coloured on a terminal, as it is elsewhere."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from dsft.cli.errors import Terminated
from dsft.cli.output import Mode, Output
from dsft.cli.views.infer_statistics import describe_statistics
from dsft.infer.code_block import FenceReader, FirstBlockReader, Part, find_code

if TYPE_CHECKING:
    from dsft.cli.views.infer_paint import AnswerPainter
    from dsft.infer.config import InferConfig

_C0 = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"}
_C1 = dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
_VISIBLE_CONTROLS = _C0 | _C1 | {ord("\r"): ""}


def make_visible(text: str) -> str:
    """Return a text with signs in place of control characters, so that a terminal shows and does not obey them."""
    return text.translate(_VISIBLE_CONTROLS)


class AnswerWriter:
    """Writes an answer as it comes; line ends at its end are held back, so that it ends with one, whatever it has.

    Args:
        output: Where to.
        is_code: Whether the code of the first block alone is written.
    """

    def __init__(self, output: Output, *, is_code: bool = False) -> None:
        self._output = output
        self._is_terminal = output.mode is not Mode.JSON and sys.stdout.isatty()
        self._painter: AnswerPainter | None = None
        if self._is_terminal and output.stdout.color_system is not None and not output.stdout.no_color:
            from dsft.cli.views import infer_paint

            self._painter = infer_paint.AnswerPainter()
        self._reader: FirstBlockReader | FenceReader | None = None
        if is_code:
            self._reader = FirstBlockReader()
        elif self._painter is not None:
            self._reader = FenceReader()
        self._held_back = ""
        self._is_begun = False

    @property
    def is_complete(self) -> bool:
        """Whether nothing that follows would be written: the code that is wanted is."""
        return isinstance(self._reader, FirstBlockReader) and self._reader.is_complete

    def write(self, text: str) -> None:
        """Take the next piece."""
        visible = make_visible(text) if self._is_terminal else text
        self._put([Part("prose", visible)] if self._reader is None else self._reader.push(visible))

    def end(self) -> None:
        """Write what was held back, and the last line's end."""
        if self._reader is not None:
            self._put(self._reader.flush())
        if self._painter is not None:
            self._put_text(self._painter.flush())
        self._output.write("")

    def break_off(self) -> None:
        """End an answer that nothing more will come of; the terminal is left in its own colours."""
        if not self._is_begun:
            return
        if self._painter is not None:
            self._output.write(self._painter.reset_code, end="")  # what was being written may be a colour
        self.end()

    def _put(self, parts: list[Part]) -> None:
        paint = self._painter.paint if self._painter is not None else lambda part: part.text
        self._put_text("".join(map(paint, parts)))

    def _put_text(self, text: str) -> None:
        body = text.rstrip("\n")
        if body:
            self._is_begun = True  # before the write: a signal may come inside it
            self._output.write(self._held_back + body, end="")
            self._held_back = ""
        self._held_back += text[len(body) :]


def answer(config: "InferConfig", output: Output, prompt: str, *, is_code: bool) -> None:
    """Answer one prompt.

    Args:
        config: Which model answers, and how.
        output: Where the answer goes.
        prompt: What is asked.
        is_code: Whether only the code of its first block is written.

    Raises:
        DsftError: Nothing could be generated.
    """
    from dsft.infer.run import run_infer

    writer = AnswerWriter(output, is_code=is_code)

    def write(text: str) -> bool:
        writer.write(text)
        return writer.is_complete

    try:
        result = run_infer(config, prompt, on_text=write, on_notice=output.note)
    except (KeyboardInterrupt, Terminated):
        writer.break_off()
        raise
    writer.end()
    output.emit(asdict(result) | ({"code": find_code(result.text)} if is_code else {}))
    output.note(describe_statistics(result))
