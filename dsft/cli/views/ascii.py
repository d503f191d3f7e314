"""Draws any renderable on a terminal or file that has no Unicode, cell for cell; knows no content."""

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

_LOOKALIKE_GROUPS = (
    ("─━╸╺╌═│╭╮╰╯├┤┬┴┼", "-=>--=|+++++++++"),
    ("▁▂▃▄▅▆▇█", "_.,:;+*#"),
    ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\|/-\\|/"),
    ("↓↑→·×✓✗★…–—•↵⇥▌⟦⟧", "v^>|x+!*.--*$>>[]"),
    ("‘’“”\u00a0°", "''\"\"  "),
)
_LOOKALIKES = str.maketrans(*("".join(characters) for characters in zip(*_LOOKALIKE_GROUPS, strict=True))) | {
    ord("｜"): "||"
}
"""One ASCII character for each character the views draw with, so that nothing moves."""


class AsciiFallback:
    """Draws what it holds; where the console's encoding lacks a character, an ASCII character of the same width.

    Args:
        content: What is drawn.
    """

    def __init__(self, content: RenderableType) -> None:
        self.content = content

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.content)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments: Iterable[Segment] = console.render(self.content, options)
        if not options.ascii_only:
            yield from segments
            return
        for text, style, control in segments:
            yield Segment(text if control else to_encodable(text, options.encoding), style, control)


def to_encodable(text: str, encoding: str) -> str:
    """Return the text with every character the encoding lacks replaced, keeping its width in terminal cells."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_to_encodable(character, encoding) for character in text)
    return text


def _to_encodable(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        lookalike = character.translate(_LOOKALIKES)
        return lookalike if lookalike.isascii() else "?" * cell_len(character)
    return character
