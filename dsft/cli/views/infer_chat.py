"""What a chat says of itself: its commands and how to write several lines."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_WRITING = (
    'A line that ends in \\ goes on in the next; lines between two lines of """ are one question, and so is what is '
    "pasted. A question that begins with a slash is written with two. Ctrl-C stops an answer, Ctrl-D leaves."
)


def render_help(commands: Mapping[str, str]) -> RenderableType:
    """Return the commands with what they do."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for usage, effect in commands.items():
        table.add_row(Text(usage, "bold"), effect)
    return Group(table, Text(_WRITING))
