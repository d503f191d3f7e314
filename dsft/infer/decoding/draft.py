"""Drafts of the next tokens from the text itself: what followed the same tokens before (prompt lookup decoding).

Code repeats names, signatures and whole lines, so the text so far is a cheap model of what comes next.
"""

from collections.abc import Sequence

MAX_DRAFT_TOKENS = 7
"""With the token before them one pass reads at most eight, as many as the smallest tile of a matrix unit."""

_LONGEST_MATCH = 4
_SHORTEST_MATCH = 2
"""A single token is followed by too many others: most drafts from it are refused, and cost a wider pass."""


class PromptLookup:
    """The text so far, and where each sequence of a few tokens stood last in it.

    Args:
        text: Token ids of the prompt.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # of each sequence, the position after its last place but the end
        for token_id in text:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Add a token to the text."""
        # The sequences that end the text now get something after them, so they can be found from here on.
        for length in range(_SHORTEST_MATCH, _LONGEST_MATCH + 1):
            if len(self._text) >= length:
                self._ends[tuple(self._text[-length:])] = len(self._text)
        self._text.append(token_id)

    def find(self, max_tokens: int) -> list[int]:
        """Return what followed the longest sequence that ends the text and stood in it before; often nothing.

        Args:
            max_tokens: Most tokens to return, beside MAX_DRAFT_TOKENS.
        """
        num_tokens = min(max_tokens, MAX_DRAFT_TOKENS)
        if num_tokens <= 0:
            return []
        for length in range(min(_LONGEST_MATCH, len(self._text)), _SHORTEST_MATCH - 1, -1):
            end = self._ends.get(tuple(self._text[-length:]))
            if end is not None:
                return self._copy_from(end, num_tokens)
        return []

    def _copy_from(self, start: int, num_tokens: int) -> list[int]:
        # A text that repeats itself at its very end is copied on from the copy.
        period = len(self._text) - start
        return [self._text[start + offset % period] for offset in range(num_tokens)]
