"""Small pieces the views are drawn with: bars, sparklines, lines of parts; they know no run."""

import math
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.text import Text

from dsft.core.units import format_count, format_duration

_SPARKS = "▁▂▃▄▅▆▇█"


def flow(parts: Iterable[str], width: int, style: str = "") -> list[Text]:
    """Set parts one after the other with a dot between, in as many lines as they need; no part is broken."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1]) + cell_len(part) + 3 <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return [clip(Text(line, style), width) for line in lines]


def draw_bar(fraction: float, width: int, style: str) -> Text:
    """Draw a bar that reads without colour too: heavy for what is done, light for the rest."""
    done, rest = split_bar(fraction, width)
    return Text.assemble((done, style), (rest, "dim"))


def split_bar(fraction: float, width: int) -> tuple[str, str]:
    """Return the characters of a bar: those for what is done and those for the rest."""
    halves = round(min(1.0, max(0.0, fraction)) * width * 2)
    done = "━" * (halves // 2) + "╸" * (halves % 2)
    return done, "─" * (width - len(done))


def draw_sparkline(values: Sequence[float]) -> str:
    """Draw a character of eight heights for each value, from the least to the greatest; `!` if it is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_SPARKS) - 1

    def draw(value: float) -> str:
        if not math.isfinite(value):
            return "!"
        return _SPARKS[round((value - low) / span * top)] if span > 0 else _SPARKS[top // 2]

    return "".join(draw(value) for value in values)


def draw_history(percents: Iterable[float | None], num_rows: int = 1) -> list[str]:
    """Draw percentages on a scale that is always the same, in characters of eight heights.

    Args:
        percents: From 0 to 100; None, which leaves a gap, where there is none.
        num_rows: Rows the scale is spread over.

    Returns:
        The rows, the top one first.
    """
    top = len(_SPARKS) * num_rows
    heights = [
        0 if percent is None else max(1, round(min(100.0, max(0.0, percent)) / 100 * top)) for percent in percents
    ]
    columns = " " + _SPARKS
    return [
        "".join([columns[min(8, max(0, height - below))] for height in heights]) for below in range(top - 8, -1, -8)
    ]


def clip(text: Text, width: int) -> Text:
    """Cut a text to one line of `width` columns, in place, and return it."""
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text


def count_nouns(count: float, noun: str) -> str:
    """Return a count with its noun, which takes an s unless the count is 1, e.g. `1 row`, `1,200 rows`."""
    return with_noun(format_count(count), noun)


def with_noun(number: str, noun: str) -> str:
    """Return a number that is written already with its noun, e.g. `1 epoch`, `0.5 epochs`."""
    return f"{number} {noun}{'' if number == '1' else 's'}"


def format_step_time(seconds: float) -> str:
    """Return the duration of a step, finer than other durations because steps are compared."""
    return f"{seconds:.2f} s" if seconds < 10 else format_duration(seconds)
