"""Which parts of an answer are code: Markdown's fenced blocks, found while the text still comes in.

The rules are CommonMark's (0.31.2, section 4.5) with one exception: an opening fence may be indented by any amount,
because models put blocks under list items without an exact indentation.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PartKind = Literal["prose", "fence", "indent", "code"]

_PIECES = re.compile(r"[^\n]*\n|[^\n]+")
_OPENING = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)")
_MAYBE_OPENING = re.compile(r"[ \t]*(`{0,2}|~{0,2}|`{3,}[^`\n]*|~{3,}[^\n]*)")
_CLOSING = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`*|~*)[ \t]*\r?")
_LANGUAGE = re.compile(r"[\w+#-]+")

_MAX_MORE_INDENT = 3
"""Columns by which a closing fence may be further right than its block."""


@dataclass(frozen=True)
class Part:
    """A piece of an answer of one kind; it may be part of a line or several lines.

    Attributes:
        kind: A fence is the whole line that opens or closes a block; an indent is what a line of code has before it
            because its block is indented, and no part of the code.
        text: The piece; all pieces together are the answer.
        language: First word behind the block's opening fence, in lower case; empty outside blocks.
    """

    kind: PartKind
    text: str
    language: str = ""


class FenceReader:
    """Tells prose from fenced code; takes text in pieces cut anywhere.

    Only the beginning of a line that may become a fence is held back. A block that nothing closes ends with the text.
    """

    def __init__(self) -> None:
        self._held_back = ""
        self._is_line_decided = False
        self._fence: str | None = None  # that opened the block
        self._indent = 0
        self._language = ""

    def push(self, text: str) -> list[Part]:
        """Return what has become certain with more text."""
        return [part for piece in _PIECES.findall(text) for part in self._push_piece(piece)]

    def flush(self) -> list[Part]:
        """Return what was held back: the text has ended."""
        line, self._held_back = self._held_back, ""
        return list(self._decide(line)) if line else []

    def _push_piece(self, piece: str) -> Iterator[Part]:
        is_complete = piece.endswith("\n")
        if self._is_line_decided:
            yield self._content(piece)
        else:
            line, self._held_back = self._held_back + piece, ""
            if not is_complete and self._may_be_fence(line):
                self._held_back = line
                return
            yield from self._decide(line)
        self._is_line_decided = not is_complete

    def _may_be_fence(self, line: str) -> bool:
        if self._fence is None:
            return _MAYBE_OPENING.fullmatch(line) is not None
        return _CLOSING.fullmatch(line) is not None

    def _decide(self, line: str) -> Iterator[Part]:
        bare = line.removesuffix("\n")
        if self._fence is None:
            opening = _OPENING.fullmatch(bare)
            if opening is None:
                yield self._content(line)
                return
            language = _LANGUAGE.search(opening["info"])
            self._fence, self._indent = opening["fence"], len(opening["indent"])
            self._language = language[0].lower() if language else ""
            yield Part("fence", line, self._language)
        elif self._is_closing(bare):
            yield Part("fence", line, self._language)
            self._fence = None
        else:
            num_blanks = min(self._indent, len(bare) - len(bare.lstrip(" \t")))
            if num_blanks:
                yield Part("indent", line[:num_blanks], self._language)
            if num_blanks < len(line):
                yield self._content(line[num_blanks:])

    def _is_closing(self, line: str) -> bool:
        closing = _CLOSING.fullmatch(line)
        return (
            closing is not None
            and self._fence is not None
            and closing["fence"].startswith(self._fence)
            and len(closing["indent"]) <= self._indent + _MAX_MORE_INDENT
        )

    def _content(self, text: str) -> Part:
        return Part("prose", text) if self._fence is None else Part("code", text, self._language)


class FirstBlockReader:
    """Passes on the code of an answer's first block alone; an answer without a block comes whole, at its end.

    The first block only: what follows it is mostly an example of use or another language's, and the blocks joined
    would be no program.
    """

    def __init__(self) -> None:
        self._reader = FenceReader()
        self._pieces: list[str] = []
        self._num_fences = 0

    @property
    def is_complete(self) -> bool:
        """Whether the block is closed, so that nothing more will come."""
        return self._num_fences > 1

    def push(self, text: str) -> list[Part]:
        """Return the code that has become certain with more text."""
        if self._num_fences == 0:
            self._pieces.append(text)
        return self._choose(self._reader.push(text))

    def flush(self) -> list[Part]:
        """Return what was held back: the text has ended."""
        parts = self._choose(self._reader.flush())
        if self._num_fences > 0:
            return parts
        return [Part("prose", "".join(self._pieces))] if self._pieces else []

    def _choose(self, parts: list[Part]) -> list[Part]:
        chosen = []
        for part in parts:
            self._num_fences += part.kind == "fence"
            if part.kind == "code" and self._num_fences == 1:
                chosen.append(part)
        return chosen


def find_code(answer: str) -> str:
    """Return the code of an answer's first fenced block, or the whole answer where there is none."""
    reader = FirstBlockReader()
    return "".join(part.text for part in [*reader.push(answer), *reader.flush()])
