"""Rows of the monitor's screen: styled parts whose width in terminal cells is known as they are put together.

Rich's Text measures and splits again what is measured already; at a frame a second that is most of a monitor's cost.
"""

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from dsft.cli.views.drawing import split_bar

_SEPARATOR = " · "

_MIN_RULED_WIDTH = 30
"""Below this many columns a heading has words alone."""


class Line:
    """One row, or a part of one.

    Args:
        text: Its first part; printable, in one line.
        style: Of that part, in rich's words.
        rank: Rows of low rank leave first where the screen is too low.

    Attributes:
        parts: Text and style of each part.
        width: In terminal cells.
    """

    __slots__ = ("parts", "rank", "width")

    def __init__(self, text: str = "", style: str = "", rank: int = 0) -> None:
        self.parts: list[tuple[str, str]] = []
        self.width = 0
        self.rank = rank
        if text:
            self.add(text, style)

    @property
    def plain(self) -> str:
        """Its text without styles."""
        return "".join(text for text, _ in self.parts)

    def add(self, text: str, style: str = "") -> "Line":
        """Append a part and return the line."""
        self.parts.append((text, style))
        self.width += len(text) if text.isascii() else cell_len(text)
        return self

    def join(self, other: "Line") -> "Line":
        """Append the parts of another line and return this one."""
        self.parts += other.parts
        self.width += other.width
        return self

    def fill(self, width: int) -> "Line":
        """Append spaces up to a width and return the line."""
        return self.add(" " * (width - self.width)) if width > self.width else self

    def add_bar(self, fraction: float | None, width: int, style: str) -> "Line":
        """Append a bar of a width, empty where there is no fraction, and return the line."""
        done, rest = split_bar(fraction or 0.0, width)
        return self.add(done, style).add(rest, "dim")

    def clip(self, width: int) -> "Line":
        """Cut it to a width, with a sign that there was more, and return it."""
        if self.width <= width:
            return self
        room, kept = max(0, width - 1), []
        for text, style in self.parts:
            part_width = cell_len(text)
            if part_width > room:
                kept.append((set_cell_size(text, room), style))
                kept.append(("…", style))
                break
            kept.append((text, style))
            room -= part_width
        self.parts, self.width = kept if width > 0 else [], max(0, width)
        return self


class Rows:
    """Rows as something rich draws.

    Args:
        lines: The rows, none wider than the terminal.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        end = Segment.line()
        for line in self.lines:
            for text, style in line.parts:
                yield Segment(text, Style.parse(style) if style else None)
            yield end


def printable(text: str) -> str:
    """Return a text from outside with a space for all that could move the cursor or turn the direction of writing."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


def clip_text(text: str, width: int) -> str:
    """Return a text cut to a width in cells, with a sign that there was more."""
    if len(text) <= width and text.isascii():
        return text
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1) + "…" if width > 0 else ""


def labelled(label: str, value: str, style: str = "") -> Line:
    """Return a dim label with its value."""
    return Line(f"{label} ", "dim").add(value, style)


def flow_lines(parts: Iterable[Line], width: int, indent: int = 0, rank: int = 0) -> list[Line]:
    """Set parts one after the other with a dot between, in as many rows as they need; no part is broken."""
    rows: list[Line] = []
    for part in parts:
        if rows and rows[-1].width + len(_SEPARATOR) + part.width <= width:
            rows[-1].add(_SEPARATOR, "dim").join(part)
        else:
            rows.append(Line(" " * indent, rank=rank).join(part))
    return [row.clip(width) for row in rows]


def wrap_words(text: str, width: int, style: str = "", rank: int = 0) -> list[Line]:
    """Break a sentence between words into rows."""
    rows: list[str] = []
    for word in printable(text).split():
        if rows and cell_len(rows[-1]) + 1 + cell_len(word) <= width:
            rows[-1] += f" {word}"
        else:
            rows.append(word)
    return [Line(row, style, rank).clip(width) for row in rows]


def join_fitting(fields: Sequence[tuple[int, Line]], width: int, gap: str = "  ", rank: int = 0) -> Line:
    """Set fields side by side; those of the lowest priority are left out until the rest fits.

    Args:
        fields: Priority and content, in the order of the screen.
        width: Of the row.
        gap: Between two fields.
        rank: Of the row.
    """
    kept = list(fields)
    while len(kept) > 1 and sum(line.width for _, line in kept) + len(gap) * (len(kept) - 1) > width:
        kept.remove(min(kept, key=lambda field: field[0]))
    row = Line(rank=rank)
    for position, (_, line) in enumerate(kept):
        if position:
            row.add(gap)
        row.join(line)
    return row.clip(width)


def fits_in_heading(title: Line, note: Line, width: int) -> bool:
    """Return whether a heading of a width has room for both."""
    edges = 2 * len("── ") if width >= _MIN_RULED_WIDTH else 0
    return title.width + note.width + edges + 4 <= width


def draw_heading(title: Line, width: int, note: Line | None = None, rank: int = 0) -> Line:
    """Draw the heading of a section: a rule with words in it.

    Args:
        title: The words at the left.
        width: Of the row.
        note: Words at the right; left out where there is no room.
        rank: Of the row.
    """
    row = Line("── " if width >= _MIN_RULED_WIDTH else "", "dim", rank).join(title)
    end = 3 if width >= _MIN_RULED_WIDTH else 0
    if note is not None and note.width and fits_in_heading(title, note, width):
        row.add(" " + "─" * (width - row.width - note.width - end - 2) + " ", "dim").join(note)
    if row.width + 2 <= width:
        row.add(" " + "─" * (width - row.width - 1), "dim")
    return row.clip(width)
