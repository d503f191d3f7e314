"""A process's command line for the screen: secrets masked, control characters replaced, length limited."""

import re
from collections.abc import Sequence
from itertools import pairwise

from dsft.monitor.secret_names import is_harmless_value, is_secret_name
from dsft.monitor.secret_text import MASK, mask_text

MAX_CHARS = 2_000

_BLANKS = re.compile(r"[\t\n\v\f\r]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]+")
_ASSIGNMENT = re.compile(r"(?P<name>[-+]{0,2}[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")
_KEY = re.compile(r"[A-Za-z][\w-]*[_.][\w.-]+")
_SCRIPT_OPTION = re.compile(r"-[a-z]*c|--command|-e|--eval")
_USER_OPTIONS = frozenset({"-u", "--user", "--proxy-user"})
_USER_PASSWORD = re.compile(r"(?P<user>[^:/]+):(?!\d+$).+", re.DOTALL)
_LOGIN_KEY = re.compile(r"[0-9a-f]{40}")

_PASSWORD_OPTIONS = {"sshpass": "-p", "redis-cli": "-a", "login": "-p"}
"""By a word that stands before: a short option whose value is a password."""
_JOINED_PASSWORD = re.compile(r"-p.+")
_JOINED_PROGRAMS = frozenset({"mysql", "mysqldump", "mysqladmin", "mariadb", "sshpass"})


def describe_command(arguments: Sequence[str]) -> str:
    """Return program and arguments as one line.

    Args:
        arguments: As the process was given them, its own name first.
    """
    if not arguments:
        return ""
    program = arguments[0]
    if len(arguments) == 1 and " " in program:  # a process that gave itself a title
        first, _, rest = program.partition(" ")
        text = f"{_base_name(first)} {mask_text(rest)}" if first.startswith("/") else mask_text(program)
    else:
        text = " ".join([mask_text(_base_name(program)), *_mask_arguments(arguments)])
    text = clean_text(text)
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 1]}…"


def clean_text(text: str) -> str:
    """Return a text without what a terminal would obey: line ends become blanks, other controls a question mark."""
    return _CONTROL.sub("?", _BLANKS.sub(" ", text)).strip()


def _base_name(program: str) -> str:
    return program.rstrip("/").rpartition("/")[2] or program


def _mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments after the program, masked."""
    words = {_base_name(arguments[0])}
    masked = []
    for before, argument in pairwise(arguments):
        masked.append(_mask_argument(argument, before, words))
        words.add(_base_name(argument))
    return masked


def _mask_argument(argument: str, before: str, words: set[str]) -> str:
    if _is_asked_for(before) and not argument.startswith("--"):
        return argument if is_harmless_value(argument) else MASK
    if any(before == option and word in words for word, option in _PASSWORD_OPTIONS.items()):
        return MASK
    if words & _JOINED_PROGRAMS and _JOINED_PASSWORD.fullmatch(argument):
        return f"-p{MASK}"
    if "login" in words and _LOGIN_KEY.fullmatch(argument):  # wandb login KEY
        return MASK
    if before in _USER_OPTIONS and (user := _USER_PASSWORD.fullmatch(argument)):
        return f"{user['user']}:{MASK}"
    if _SCRIPT_OPTION.fullmatch(before):
        return mask_text(argument)
    return _mask_assignment(argument)


def _is_asked_for(before: str) -> bool:
    """Return whether an argument names a secret that the next one is."""
    return bool(_OPTION.fullmatch(before) or _KEY.fullmatch(before)) and is_secret_name(before)


def _mask_assignment(argument: str) -> str:
    """Mask all behind `NAME=` where the name speaks of a secret: it may hold blanks and any other characters."""
    assignment = _ASSIGNMENT.fullmatch(argument)
    if assignment is None:
        return mask_text(argument)
    name, value = assignment["name"], assignment["value"]
    if not is_secret_name(name):
        return f"{name}={_mask_assignment(value)}"
    return argument if is_harmless_value(value) else f"{name}={MASK}"
