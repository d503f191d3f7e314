"""`dsft infer --fim`: what fills a gap goes to stdout as it comes, and into the file if that is asked for."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from dsft.cli.errors import Terminated
from dsft.cli.events import outlive_reader
from dsft.cli.infer_answer import make_visible
from dsft.cli.output import Mode, Output

if TYPE_CHECKING:
    from dsft.infer.config import InferConfig
    from dsft.infer.fill import FillRequest


def fill(config: "InferConfig", output: Output, request: "FillRequest") -> None:
    """Fill a gap.

    Args:
        config: Which model answers, and how.
        output: Where the text goes.
        request: Which gap.

    Raises:
        DsftError: Nothing could be generated, or it could not be written back; then the text is on stdout.
    """
    from dsft.cli.views.infer_statistics import describe_statistics
    from dsft.infer.fill import run_fill

    writer = _FillWriter(output)
    # A reader of stdout that is gone ends a mere answer, but not one that is for a file.
    write = outlive_reader(writer.write) if request.in_place else writer.write
    written: list[bool] = []
    try:
        result = run_fill(config, request, write, output.note, lambda: written.append(True))
    except (KeyboardInterrupt, Terminated) as stop:
        writer.end()
        if request.in_place:
            stop.add_note(f"{request.file} {'was written by then' if written else 'is as it was'}.")
        raise
    writer.end()
    output.emit(asdict(result.answer) | {"file": result.file, "is_written": result.is_written})
    output.note(describe_statistics(result.answer))
    if result.is_written:
        output.note(f"{result.file}:{result.line}: the mark was replaced.")
    if result.problem is not None:
        raise result.problem


class _FillWriter:
    """Writes what fills a gap to the letter, as blanks count there.

    A terminal gets signs in place of control characters, and a line end.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._is_terminal = output.mode is not Mode.JSON and sys.stdout.isatty()
        self._is_line_open = False

    def write(self, text: str) -> None:
        self._is_line_open = not text.endswith("\n")  # before the write: a signal may come inside it
        self._output.write(make_visible(text) if self._is_terminal else text, end="")

    def end(self) -> None:
        if self._is_line_open and self._is_terminal:
            self._output.write("")
