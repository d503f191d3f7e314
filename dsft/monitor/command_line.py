"""A process's command line for the screen: secrets masked, control characters replaced, length limited."""

import re
from collections.abc import Sequence

MAX_CHARS = 2_000
MASK = "***"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")


def clean_text(text: str) -> str:
    """Return a text without what a terminal would obey: control characters become one question mark."""
    return _CONTROL.sub("?", text)


def describe_command(arguments: Sequence[str]) -> str:
    """Return program and arguments as one line.

    Args:
        arguments: As the process was given them, its own name first.
    """
    return clean_text(" ".join(arguments))[:MAX_CHARS]
