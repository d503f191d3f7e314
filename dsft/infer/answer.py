"""One answer as it grows: tokens come in, certain text goes out; knows when the answer has ended and why."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from dsft.infer.stream import StopStringFilter, TokenDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

StopReason = Literal["end_token", "stop_string", "code_complete", "max_new_tokens", "context_full"]

OnText = Callable[[str], bool | None]
"""Receives a piece of an answer as soon as it is certain; True says that the code that was asked for is complete."""

_ENDED_IN_TEXT: tuple[StopReason | None, ...] = ("stop_string", "code_complete")


class Answer:
    """Collects an answer and passes its text on as it becomes certain.

    Args:
        tokenizer: Turns tokens into text.
        stop_token_ids: Tokens that end the answer and are no part of its text.
        stop_strings: Texts that end the answer and are no part of it.
        continued_ids: Tokens of the prompt, which the answer continues.
        limit_reason: Why an answer ends that neither a stop token nor a stop string ends.
        on_text: Receives the pieces of text; they are never empty, and together they are the answer. If it returns
            True, the answer ends with that piece.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        stop_token_ids: Collection[int],
        stop_strings: Iterable[str],
        continued_ids: Sequence[int],
        limit_reason: StopReason,
        on_text: OnText,
    ) -> None:
        self._decoder = TokenDecoder(tokenizer, continued_ids)
        self._filter = StopStringFilter(stop_strings)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._on_text = on_text
        self._pieces: list[str] = []
        self._started_s = self._first_s = self._last_s = time.perf_counter()
        self._limit_reason = limit_reason
        self._end: StopReason | None = None
        self.num_tokens = 0

    def push(self, token_id: int) -> bool:
        """Take one more token; return whether the answer has ended with it."""
        self._last_s = time.perf_counter()
        if self.num_tokens == 0:
            self._first_s = self._last_s
        self.num_tokens += 1
        if token_id in self._stop_token_ids:
            self._end = "end_token"
        else:
            self._pass_on(self._decoder.push(token_id))
        return self._end is not None

    def finish(self) -> None:
        """Give out the text that was held back, up to a stop string; none where the code was complete before it."""
        self._pass_on(self._decoder.flush())
        if self._end not in _ENDED_IN_TEXT:
            self._emit(self._filter.flush())

    @property
    def stop_reason(self) -> StopReason:
        """Why the answer ended; before that, why it would end at the limit."""
        return self._end or self._limit_reason

    @property
    def text(self) -> str:
        """The answer so far, as far as it was passed on."""
        return "".join(self._pieces)

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds from the answer's creation to its first token."""
        return self._first_s - self._started_s

    @property
    def tok_per_s(self) -> float | None:
        """Tokens after the first one by the seconds they took; None where there are none."""
        duration_s = self._last_s - self._first_s
        return (self.num_tokens - 1) / duration_s if duration_s > 0 else None

    def _pass_on(self, text: str) -> None:
        if self._end in _ENDED_IN_TEXT:
            return
        is_enough = self._emit(self._filter.push(text))
        if is_enough and self._end is None:
            self._end = "code_complete"
        elif self._filter.is_stopped:
            self._end = "stop_string"

    def _emit(self, text: str) -> bool:
        if not text:
            return False
        self._pieces.append(text)
        return self._on_text(text) is True
