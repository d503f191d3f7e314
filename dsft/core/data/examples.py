"""What a usable row is, whatever file and columns it came from: a conversation, a text, or a text with a gap."""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    """One message of a conversation.

    Attributes:
        role: Who speaks.
        text: What is said, as it stands in the data.
        is_target: Whether the model is to learn it; only ever true of the assistant's turns.
    """

    role: Role
    text: str
    is_target: bool = False


@dataclass(frozen=True)
class Conversation:
    """Perhaps a system turn, then user and assistant in turn; the last is the assistant's and a target."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class RawText:
    """A text to learn as a whole.

    Attributes:
        text: The text.
        parse_special: Whether control tokens spelled in it are meant; not so in source files, which may quote them.
    """

    text: str
    parse_special: bool


@dataclass(frozen=True)
class FimTriple:
    """A text whose middle is to be filled in between the other two parts."""

    prefix: str
    suffix: str
    middle: str


Example = Conversation | RawText | FimTriple


class UnusableRowError(Exception):
    """A row can't be used; the reason holds none of its content, so that rows can be counted by reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def prompt_of(example: Example) -> str:
    """Return what the model is given before it has to answer; examples with the same prompt belong together."""
    if isinstance(example, FimTriple):
        return f"{example.prefix}\0{example.suffix}"
    if isinstance(example, RawText):
        return example.text
    first_target = next(index for index, turn in enumerate(example.turns) if turn.is_target)
    return "\0".join(f"{turn.role}\0{turn.text}" for turn in example.turns[:first_target])


def hash_text(text: str) -> int:
    """Return a 64-bit hash of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
