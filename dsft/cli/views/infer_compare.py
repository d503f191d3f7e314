"""Two answers to one prompt: side by side where there is room, else one below the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.infer_paint import CODE_THEME
from dsft.infer.code_block import FenceReader, Part

if TYPE_CHECKING:
    from dsft.infer.compare import Comparison, Side

SIDE_NAMES: "dict[Side, str]" = {"base": "Base alone", "adapter": "With adapter"}

_MIN_COLUMN_WIDTH = 48
_DIVIDER = " │ "


@dataclass(frozen=True)
class Section:
    """One of the answers.

    Attributes:
        side: Whose it is.
        name: Of its model.
        text: What it says.
    """

    side: "Side"
    name: str
    text: str


def list_sections(comparison: "Comparison") -> list[Section]:
    """Return both answers of a comparison, the base's first."""
    base, adapter = comparison.base, comparison.adapter
    return [Section("base", str(adapter.base), base.text), Section("adapter", adapter.model, adapter.text)]


def write_sections(sections: Sequence[Section]) -> str:
    """Return answers as plain text, one below the other, for a file or pipe."""
    written = [
        f"=== {SIDE_NAMES[section.side]}: {section.name} ===\n{section.text.rstrip(chr(10))}\n" for section in sections
    ]
    return "\n".join(written).removesuffix("\n")


def draw_sections(sections: Sequence[Section], make_visible: Callable[[str], str]) -> RenderableType:
    """Draw answers.

    Args:
        sections: Both of them, or the one that there is.
        make_visible: Takes the control characters out of a text.
    """
    drawn = [
        (
            Text.assemble((SIDE_NAMES[section.side], "bold cyan"), f" {section.name}"),
            _draw_answer(make_visible(section.text)),
        )
        for section in sections
    ]
    return AsciiFallback(_SideBySide(drawn))


class _SideBySide:
    """Titles and bodies in two columns, or below one another where columns would be too narrow for code."""

    def __init__(self, drawn: list[tuple[Text, RenderableType]]) -> None:
        self._drawn = drawn

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if len(self._drawn) == 1 or options.max_width < 2 * _MIN_COLUMN_WIDTH + len(_DIVIDER):
            for index, (title, body) in enumerate(self._drawn):
                if index:
                    yield Text()
                yield Group(title, Rule(style="dim"), body)
            return
        table = Table.grid(expand=True, padding=0)
        width = (options.max_width - len(_DIVIDER)) // 2
        for column_width in (width, len(_DIVIDER), width):
            table.add_column(width=column_width, overflow="fold")
        (left_title, left), (right_title, right) = self._drawn
        lines = len(console.render_lines(left, options.update(width=width)))
        lines = max(lines, len(console.render_lines(right, options.update(width=width))))
        divider = Text("\n".join([_DIVIDER] * lines), "dim")
        table.add_row(left_title, "", right_title)
        table.add_row(Rule(style="dim"), Text("─┼─", "dim"), Rule(style="dim"))
        table.add_row(left, divider, right)
        yield table


def _draw_answer(text: str) -> RenderableType:
    reader = FenceReader()
    drawn: list[RenderableType] = []
    for kind, language, piece in _join([*reader.push(text), *reader.flush()]):
        # Line ends between the pieces are the terminal's, so the one at a piece's end is none of its text.
        body = piece.removesuffix("\n")
        if kind == "code" and language:
            drawn.append(Syntax(body, language, theme=CODE_THEME, word_wrap=True, background_color="default"))
        else:
            drawn.append(Text(body, "dim" if kind == "fence" else "", overflow="fold"))
    return Group(*drawn)


def _join(parts: list[Part]) -> list[tuple[str, str, str]]:
    joined: list[tuple[str, str, str]] = []
    for part in parts:
        kind = "code" if part.kind == "indent" else part.kind
        before = joined[-1] if joined else None
        if before is not None and before[0] == kind != "fence":
            joined[-1] = (kind, part.language, before[2] + part.text)
        else:
            joined.append((kind, part.language, part.text))
    return joined
