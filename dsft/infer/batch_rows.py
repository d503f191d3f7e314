"""Reading prompts out of a file, one a line; a line that asks nothing is a row with a problem, and the others go on."""

import codecs
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dsft.core.data.examples import Conversation, FimTriple, UnusableRowError
from dsft.core.data.formats import HISTORY_COLUMN, INPUT_COLUMN, INSTRUCTION_COLUMNS, SYSTEM_COLUMN, find_layout
from dsft.core.data.prompts import FimPrompt, Prompt
from dsft.core.data.rows import Row
from dsft.core.errors import ConfigError, DsftError, InputError
from dsft.infer.config import InferConfig

_STDIN_NAME = Path("-")

_STAND_IN = "-"
"""Stands for the answer, so that a question is read exactly as training reads it."""


@dataclass(frozen=True)
class RowProblem:
    """Why a row has no answer.

    Attributes:
        kind: Class name of the error, for programs.
        found: What was found.
        fix: What to do about it, or empty.
    """

    kind: str
    found: str
    fix: str = ""

    @classmethod
    def of(cls, error: DsftError) -> "RowProblem":
        """Return an error without its traceback, which would keep what was in memory."""
        return cls(type(error).__name__, error.found, error.fix)


@dataclass(frozen=True)
class AskedRow:
    """A row of a file of prompts.

    Attributes:
        line: Its line, counted from 1.
        tags: What its answer begins with: its line, and its id where it has one.
        prompt: What is asked; None where there is a problem.
        problem: Why it can't be asked.
    """

    line: int
    tags: dict[str, Any]
    prompt: Prompt | None
    problem: RowProblem | None


def read_asked_rows(path: Path) -> tuple[list[AskedRow], str]:
    """Read a file of prompts.

    Args:
        path: JSON Lines, or a text file with one prompt a line; `-` is stdin. That, and pipes, have no name
            that would say it and hold JSON Lines.

    Returns:
        Its rows in order, and a digest of the file.

    Raises:
        ConfigError: Its name says that it is something else.
        InputError: It can't be read or holds no row.
    """
    parse = _choose_parser(path)
    rows = []
    digest = hashlib.blake2b(digest_size=16)
    try:
        with os.fdopen(0, "rb", closefd=False) if path == _STDIN_NAME else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    rows.append(_read_row(number, text, parse))
    except OSError as error:
        raise InputError(
            f"{path} can't be read: {error.strerror or error}.", "Check the file and its rights."
        ) from error
    if not rows:
        raise InputError(f"{path} holds no prompts.", "Write one a line.")
    return rows, digest.hexdigest()


def _choose_parser(path: Path) -> Callable[[str], Any]:
    if path.is_dir():
        raise ConfigError(f"--file takes a file of prompts, and {path} is a folder.", "Name a file in it.")
    if path == _STDIN_NAME or path.is_fifo() or path.is_relative_to("/dev"):
        return _parse_json
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(
            f"--file takes JSON Lines (.jsonl, .ndjson) or one prompt a line (.txt), and {path} is neither.",
            "Rename it, or write it in one of them.",
        )
    return parse


def find_misfit(row: AskedRow, config: InferConfig) -> RowProblem | None:
    """Return why a row can't be asked with the settings; None where that is not known without the model."""
    if not isinstance(row.prompt, Sequence) or isinstance(row.prompt, str):
        return None
    if config.is_raw:
        return RowProblem("BadRow", "has turns or a system text, and --raw takes a prompt alone")
    if config.system is not None and row.prompt[0].role == "system":
        return RowProblem("BadRow", "has a system text of its own beside that of --system")
    return None


def record_problem(row: AskedRow, problem: RowProblem) -> dict[str, Any]:
    """Return what stands among the answers for a row that has none."""
    fix = {"fix": problem.fix} if problem.fix else {}
    return row.tags | {"error": {"kind": problem.kind, "found": problem.found, **fix}}


def _read_row(number: int, line: bytes, parse: Callable[[str], Any]) -> AskedRow:
    tags: dict[str, Any] = {"line": number}
    try:
        value = parse(line.decode("utf-8").rstrip("\r\n"))
        if isinstance(value, dict) and "id" in value:
            tags["id"] = value["id"]
        prompt = _read_prompt(value)
    except UnicodeDecodeError as error:
        return AskedRow(number, tags, None, RowProblem("BadRow", f"is not in UTF-8 (byte 0x{line[error.start]:02x})"))
    except UnusableRowError as error:
        return AskedRow(number, tags, None, RowProblem("BadRow", error.reason))
    return AskedRow(number, tags, prompt, None)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float)
    except json.JSONDecodeError as error:
        raise UnusableRowError(f"broken JSON: {error.msg.removesuffix(' at')} (column {error.colno})") from None
    except ValueError as error:  # NaN, or a number of too many digits
        raise UnusableRowError(f"broken JSON: {error}") from None
    except RecursionError:
        raise UnusableRowError("nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # an answer with it as its id could not be written
        raise UnusableRowError(f"holds a number that is too large: {text[:20]}")
    return number


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".jsonl": _parse_json,
    ".ndjson": _parse_json,
    ".txt": lambda text: text,
}


def _read_prompt(value: Any) -> Prompt:
    """Return what a row asks.

    Raises:
        UnusableRowError: It asks nothing that is known.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise UnusableRowError("is neither a JSON object nor a text")
    values = _complete(value)
    example = find_layout(Row(0, "the row", values), "file").parse(values)
    if isinstance(example, FimTriple):
        return FimPrompt(example.prefix, example.suffix)
    if not isinstance(example, Conversation):
        raise TypeError("a row with an answer is a conversation")
    turns = example.turns[:-1]
    return turns[0].text if len(turns) == 1 and turns[0].role == "user" else turns


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that ask, with a stand-in for the answer."""
    if "messages" in values:
        messages = values["messages"]
        if isinstance(messages, list) and messages:
            last = messages[-1]
            if isinstance(last, dict) and last.get("role") in ("assistant", "system"):
                raise UnusableRowError("messages do not end with a user turn")
            messages = [*messages, {"role": "assistant", "content": _STAND_IN}]
        return {"messages": messages} | _pick(values, SYSTEM_COLUMN)
    if "prefix" in values and "suffix" in values:
        return {"middle": _STAND_IN} | _pick(values, "prefix", "suffix")
    question = next((column for column in INSTRUCTION_COLUMNS if column in values), None)
    if question is None:
        raise UnusableRowError("has no prompt, instruction or messages")
    answer = "completion" if question == "prompt" else "output"
    return {answer: _STAND_IN} | _pick(values, question, INPUT_COLUMN, SYSTEM_COLUMN, HISTORY_COLUMN)


def _pick(values: Mapping[str, Any], *columns: str) -> dict[str, Any]:
    return {column: values[column] for column in columns if column in values}
