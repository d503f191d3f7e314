"""A process's command line for the screen: secrets masked, control characters replaced, length limited."""

import re
from collections.abc import Sequence
from itertools import pairwise

from dsft.monitor.secret_text import ARGUMENT_END, mask_text

MAX_CHARS = 2_000

_BLANKS = re.compile(r"[\t\n\v\f\r]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]+")
_SCRIPT_OPTION = re.compile(r"-[a-z]*c|--command|--eval")
_WHOLE_WORDS = re.compile(r".*[\s\0\"']", re.DOTALL)


def describe_command(arguments: Sequence[str]) -> str:
    """Return program and arguments as one line.

    Args:
        arguments: As the process was given them, its own name first.
    """
    text = _join(arguments)
    is_long = len(text) > MAX_CHARS
    if is_long:
        # What is cut off in the middle has no form that a secret could be known by.
        whole = _WHOLE_WORDS.match(text[:MAX_CHARS])
        text = whole[0] if whole is not None else ""
    text = clean_text(mask_text(text).replace(ARGUMENT_END, " "))
    return f"{text[: MAX_CHARS - 1]}…" if is_long or len(text) > MAX_CHARS else text


def clean_text(text: str) -> str:
    """Return a text without what a terminal would obey: line ends become blanks, other controls a question mark."""
    return _CONTROL.sub("?", _BLANKS.sub(" ", text)).strip()


def _base_name(program: str) -> str:
    return program.rstrip("/").rpartition("/")[2] or program


def _join(arguments: Sequence[str]) -> str:
    """Return the arguments in the form that `mask_text` takes; scripts are text in which a shell would see words."""
    if not arguments:
        return ""
    program = arguments[0]
    if len(arguments) == 1 and " " in program:  # a process that gave itself a title
        first, blank, rest = program.partition(" ")
        return f"{_base_name(first)}{blank}{rest}" if first.startswith("/") else program
    parts = [_base_name(program)]
    for before, argument in pairwise(arguments):
        parts.append(" " if _SCRIPT_OPTION.fullmatch(before) else ARGUMENT_END)
        parts.append(argument[: MAX_CHARS + 1].replace(ARGUMENT_END, "?"))
    return "".join(parts)
