"""What the end of a command is drawn with: titles, sections of named values, commands to paste; knows no command."""

import shlex
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Row = tuple[str, RenderableType]


def draw_title(text: str) -> Text:
    """Draw the title of a section, with an empty line above."""
    return Text(f"\n{text}", "bold cyan")


def draw_section(title: str, rows: Sequence[Row]) -> RenderableType:
    """Draw named values under a title."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", min_width=16)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return Group(draw_title(title), Padding(table, (0, 0, 0, 2)))


class ShellCommand:
    """A command in one line or, where that does not fit, in two that can be pasted as well.

    A line that is still too long is left to the terminal to wrap: a line end inside it would be part of a word.

    Args:
        first: Words of the first line.
        second: Words of the second, if there are two.
    """

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self._first = f"  {shlex.join(first)}"
        self._second = shlex.join(second)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Not padded: a blank behind the backslash would end the command there.
        line = f"{self._first} {self._second}"
        fits = cell_len(line) <= options.max_width
        yield Text(line if fits else f"{self._first} \\\n    {self._second}", no_wrap=True, overflow="ignore")
