"""From the columns of a row to what it means: which layout a data set has, and the example in each of its rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dsft.core.data.examples import Conversation, Example, FimTriple, RawText, Role, Turn, UnusableRowError
from dsft.core.data.rows import Row
from dsft.core.data.sources import SOURCE_FILES
from dsft.core.errors import DataError

LayoutName = Literal["instruction", "prompt/completion", "messages", "conversations", "text", "fim", "source files"]

INSTRUCTION_COLUMNS = ("instruction", "prompt", "question")
RESPONSE_COLUMNS = ("output", "response", "completion", "answer")
INPUT_COLUMN = "input"
SYSTEM_COLUMN = "system"
HISTORY_COLUMN = "history"
FIM_COLUMNS = ("prefix", "suffix", "middle")
CONTRADICT_TEXT = frozenset(
    {"code", "solution", "canonical_solution", "target", "summary", "label", "labels", "query", "context"}
    | {*INSTRUCTION_COLUMNS, *RESPONSE_COLUMNS}
)
"""Columns that leave open whether a column `text` is all there is to learn or only its question."""

KNOWN_LAYOUTS = (
    f"{' | '.join(INSTRUCTION_COLUMNS)} with {' | '.join(RESPONSE_COLUMNS)} "
    f"(and {INPUT_COLUMN}, {SYSTEM_COLUMN}, {HISTORY_COLUMN})",
    "messages",
    "conversations",
    "text",
    ", ".join(FIM_COLUMNS),
)
"""The columns by which layouts are known, for messages."""

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""Names data sets give to the three roles."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a data set are read.

    Attributes:
        name: The layout's name.
        columns: The columns that are used of those that a row has.
        parse: Makes an example of a row's values; raises UnusableRowError.
    """

    name: LayoutName
    columns: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Example]


def find_layout(row: Row, kind: str) -> Layout:
    """Recognise a data set's layout by the columns of its first row.

    Where several layouts fit, as in data sets that carry the same rows twice, the more explicit one is taken: messages,
    conversations, fim, instruction, text.

    Args:
        row: The first row.
        kind: `Source.kind`.

    Raises:
        DataError: No layout has these columns, or it can't be told what they mean.
    """
    columns = row.values.keys()
    if kind == SOURCE_FILES:
        return Layout("source files", ("text",), lambda values: _read_text(values, parse_special=False))
    if "messages" in columns:
        parse_messages = partial(_read_messages, column="messages", role_key="role", text_key="content")
        return Layout("messages", ("messages", SYSTEM_COLUMN), parse_messages)
    if "conversations" in columns:
        return Layout("conversations", ("conversations", SYSTEM_COLUMN), _read_conversations)
    if columns >= set(FIM_COLUMNS):
        return Layout("fim", FIM_COLUMNS, _read_fim)
    question = next((column for column in INSTRUCTION_COLUMNS if column in columns), None)
    answer = next((column for column in RESPONSE_COLUMNS if column in columns), None)
    if question == "prompt" and "completion" in columns:
        return Layout("prompt/completion", _exchange_columns("prompt", "completion"), _read_prompt_completion)
    if question is not None and answer is not None:
        parse = partial(_read_exchange, question=question, answer=answer)
        return Layout("instruction", _exchange_columns(question, answer), parse)
    if "text" in columns and not columns & CONTRADICT_TEXT:
        return Layout("text", ("text",), lambda values: _read_text(values, parse_special=True))
    raise _unknown_columns(row)


def _unknown_columns(row: Row) -> DataError:
    found = ", ".join(row.values) or "none"
    known = "; ".join(KNOWN_LAYOUTS)
    rivals = sorted(row.values.keys() & CONTRADICT_TEXT)
    if "text" in row.values and rivals:
        return DataError(
            f"{row.where} has the columns {found}: beside {rivals[0]} it can't be told whether text "
            "is all there is to learn.",
            "Name the columns of question and answer instruction and output, or keep only text.",
        )
    return DataError(
        f"{row.where} has the columns {found}, which are those of no known layout.",
        f"Rename them to one of: {known}.",
    )


def _exchange_columns(question: str, answer: str) -> tuple[str, ...]:
    return question, INPUT_COLUMN, answer, SYSTEM_COLUMN, HISTORY_COLUMN


def _read_exchange(values: Mapping[str, Any], question: str, answer: str) -> Conversation:
    prompt, response = _read_question(values, question), _text(values, answer)
    if not prompt.strip():
        raise UnusableRowError("the instruction is empty")
    if not response.strip():
        raise UnusableRowError("the response is empty")
    exchange = (Turn("user", prompt), Turn("assistant", response, is_target=True))
    if SYSTEM_COLUMN not in values and HISTORY_COLUMN not in values:
        return Conversation(exchange)  # nearly every row of nearly every data set, and all checks are done
    return _converse(values, [*_read_history(values), *exchange])


def _read_question(values: Mapping[str, Any], column: str) -> str:
    """Return the question with its input, where the row has one."""
    parts = [_text(values, column), _optional_text(values, INPUT_COLUMN)]
    return "\n\n".join(part for part in parts if part.strip())


def _read_history(values: Mapping[str, Any]) -> list[Turn]:
    """Return the turns before the question; as in LLaMA-Factory their answers are learned too."""
    history = values.get(HISTORY_COLUMN)
    # CSV has no lists; an empty field is none.
    if history is None or history == "":
        return []
    if not isinstance(history, list):
        raise UnusableRowError(f"history is {_kind_of(history)}, not a list of questions and answers")
    turns = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnusableRowError("history holds something other than pairs of question and answer")
        question, answer = (_text({HISTORY_COLUMN: text}, HISTORY_COLUMN) for text in pair)
        turns += [Turn("user", question), Turn("assistant", answer, is_target=True)]
    return turns


def _read_prompt_completion(values: Mapping[str, Any]) -> Example:
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _read_exchange(values, "prompt", "completion")
    # The assistant's turns of the prompt are given, not learned.
    given = (
        [Turn("user", _read_question(values, "prompt"))]
        if isinstance(prompt, str)
        else [turn._replace(is_target=False) for turn in _read_turns(values, "prompt", "role", "content")]
    )
    if not isinstance(prompt, str) and _optional_text(values, INPUT_COLUMN).strip():
        raise UnusableRowError("input stands beside a prompt that is a list of messages")
    learned = (
        [Turn("assistant", _text(values, "completion"), is_target=True)]
        if isinstance(completion, str)
        else _read_turns(values, "completion", "role", "content")
    )
    return _converse(values, [*_read_history(values), *given, *learned])


def _read_conversations(values: Mapping[str, Any]) -> Example:
    turns = values.get("conversations")
    is_share_gpt = not (isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0])
    keys = ("from", "value") if is_share_gpt else ("role", "content")
    return _read_messages(values, "conversations", *keys)


def _read_messages(values: Mapping[str, Any], column: str, role_key: str, text_key: str) -> Example:
    return _converse(values, _read_turns(values, column, role_key, text_key))


def _read_turns(values: Mapping[str, Any], column: str, role_key: str, text_key: str) -> list[Turn]:
    messages = values.get(column)
    if column not in values:
        raise UnusableRowError(f"{column} is missing")
    if not isinstance(messages, list):
        raise UnusableRowError(f"{column} is {_kind_of(messages)}, not a list of messages")
    if not messages:
        raise UnusableRowError(f"{column} is empty")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or role_key not in message or text_key not in message:
            raise UnusableRowError(f"a message in {column} has no {role_key} and {text_key}")
        role = ROLES.get(str(message[role_key]).lower())
        if role is None:
            raise UnusableRowError(f"a message in {column} has a role other than system, user and assistant")
        turns.append(Turn(role, _message_text(message, text_key), is_target=role == "assistant"))
    return turns


def _message_text(message: Mapping[str, Any], key: str) -> str:
    content = message[key]
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) < len(content):
            raise UnusableRowError("a message holds something other than text")
        return "".join(_text(part, "text") for part in parts)
    return _text(message, key)


def _read_text(values: Mapping[str, Any], *, parse_special: bool) -> Example:
    text = _text(values, "text")
    if not text.strip():
        raise UnusableRowError("text is empty")
    return RawText(text, parse_special)


def _read_fim(values: Mapping[str, Any]) -> Example:
    prefix, suffix, middle = (_text(values, column) for column in FIM_COLUMNS)
    if not middle.strip():
        raise UnusableRowError("the middle is empty")
    return FimTriple(prefix, suffix, middle)


def _converse(values: Mapping[str, Any], turns: list[Turn]) -> Conversation:
    """Check the order of turns; what follows the last target is left away, since nothing is learned from it."""
    turns = _add_system(values, [turn for turn in turns if turn.role != "system" or turn.text.strip()])
    last = max((index for index, turn in enumerate(turns) if turn.is_target), default=None)
    if last is None:
        raise UnusableRowError("no turn is the assistant's")
    turns = turns[: last + 1]
    spoken = turns[1:] if turns[0].role == "system" else turns
    for index, turn in enumerate(spoken):
        if turn.role == "system":
            raise UnusableRowError("a system turn stands behind the first turn")
        if turn.role != ("user" if index % 2 == 0 else "assistant"):
            raise UnusableRowError("user and assistant do not take turns, user first")
        if not turn.text.strip():
            raise UnusableRowError("the response is empty" if turn.role == "assistant" else "a user turn is empty")
    return Conversation(tuple(turns))


def _add_system(values: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """Put the text of the column `system`, where the row has one, before the turns."""
    text = _optional_text(values, SYSTEM_COLUMN)
    if not text.strip() or turns[:1] == [Turn("system", text)]:
        return turns
    if turns and turns[0].role == "system":
        raise UnusableRowError("the column system says something other than the system turn")
    return [Turn("system", text), *turns]


def _optional_text(values: Mapping[str, Any], column: str) -> str:
    # Looked for in each row: in JSON Lines a first row without it says nothing about the others.
    return "" if values.get(column) is None else _text(values, column)


def _text(values: Mapping[str, Any], column: str) -> str:
    """Return a column's text.

    Raises:
        UnusableRowError: It is missing, no text, or text that can't be written as UTF-8.
    """
    value = values.get(column)
    if not isinstance(value, str):
        if column not in values:
            raise UnusableRowError(f"{column} is missing")
        raise UnusableRowError(f"{column} is {_kind_of(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UnusableRowError(f"{column} holds half a character (a lone surrogate)") from None
    return value


def _kind_of(value: object) -> str:
    kinds: Iterable[tuple[type | tuple[type, ...], str]] = (
        (type(None), "null"),
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "no text")
