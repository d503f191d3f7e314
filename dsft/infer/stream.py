"""Token ids in, text out: exact pieces of valid UTF-8 as early as they are certain, and stop strings. No model here."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"

_NUM_CONTEXT_TOKENS = 8
"""Tokens of a continued text that are decoded before new ones; more than any decoder looks back."""


class TokenDecoder:
    """Decodes tokens one by one; the pieces join to what decoding all of them at once gives.

    A character may be spread over several tokens, so text that ends in a replacement character is held back.

    Args:
        tokenizer: The tokenizer.
        continued_ids: Tokens of the text that is continued; a decoder that drops the blank at a text's start then
            keeps the one at the continuation's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", continued_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(continued_ids[-_NUM_CONTEXT_TOKENS:])
        # ids[start:told] is text that was given out already, decoded again only as context of what follows.
        self._start, self._told = 0, len(self._ids)

    def push(self, token_id: int) -> str:
        """Return the text that has become certain with one more token; often empty."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what was held back; bytes that are no character become the replacement character."""
        text = self._new_text()
        self._start = self._told = len(self._ids)
        return text

    def _new_text(self) -> str:
        return self._decode(self._ids[self._start :])[len(self._decode(self._ids[self._start : self._told])) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStringFilter:
    """Passes text on up to the first stop string, holding back what may be the beginning of one.

    Args:
        stop_strings: Texts that end the answer, none of them empty.
    """

    def __init__(self, stop_strings: Iterable[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._pending = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Return the text that is certainly part of the answer; sets `is_stopped` when a stop string is complete."""
        self._pending += text
        found = [(self._pending.find(stop), stop) for stop in self._stop_strings]
        complete = [(start + len(stop), start) for start, stop in found if start >= 0]
        if complete:  # the first to be complete, however the text was cut into pieces
            self.is_stopped = True
            return self._take(min(complete)[1], keep=False)
        return self._take(len(self._pending) - self._num_held_back())

    def flush(self) -> str:
        """Return what was held back."""
        return self._take(len(self._pending))

    def _take(self, num_chars: int, keep: bool = True) -> str:
        taken = self._pending[:num_chars]
        self._pending = self._pending[num_chars:] if keep else ""
        return taken

    def _num_held_back(self) -> int:
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        for num_chars in range(min(longest, len(self._pending)), 0, -1):
            ending = self._pending[-num_chars:]
            if any(len(stop) > num_chars and stop.startswith(ending) for stop in self._stop_strings):
                return num_chars
        return 0
