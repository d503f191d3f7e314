"""Fill-in-the-middle: whose tokens mark the gap, and how a source text becomes samples that fit."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsft.core.data.examples import FimTriple

MAX_DRAWS = 8
"""How often the gap of a window is drawn anew when the sample comes out too long or the middle blank."""

CUT_SLACK = 8
"""Tokens left free in a window: cutting a text in three may add some."""


@dataclass(frozen=True)
class FimTokens:
    """The control tokens around prefix and suffix: `before_prefix` prefix `before_suffix` suffix `before_middle`."""

    before_prefix: str
    before_suffix: str
    before_middle: str


KNOWN_FIM_TOKENS = (
    FimTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    FimTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    FimTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    FimTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
)
"""In the order in which each model family was trained: prefix, suffix, middle (PSM)."""


def find_fim_tokens(control_tokens: Collection[str]) -> FimTokens | None:
    """Return the fill-in-the-middle tokens a tokenizer has, or None."""
    for tokens in KNOWN_FIM_TOKENS:
        if {tokens.before_prefix, tokens.before_suffix, tokens.before_middle} <= set(control_tokens):
            return tokens
    return None


def draw_triple(text: str, generator: np.random.Generator) -> FimTriple | None:
    """Cut a text in three at two characters drawn uniformly (Bavarian et al. 2022, arXiv:2207.14255, section 3).

    Args:
        text: The text.
        generator: Source of the two positions.

    Returns:
        The parts, or None where the middle came out blank.
    """
    start, end = sorted(generator.integers(0, len(text) + 1, size=2).tolist())
    middle = text[start:end]
    return FimTriple(text[:start], text[end:], middle) if middle.strip() else None


def cut_into_windows(
    text: str, max_tokens: int, count_tokens: Callable[[list[str]], npt.NDArray[np.int64]]
) -> Iterator[str]:
    """Cut a text into windows of whole lines; only a line that is longer than a window is cut inside.

    Args:
        text: The text.
        max_tokens: Most tokens of a window.
        count_tokens: Counts the tokens of each of some texts.

    Yields:
        The windows in order; together they are the text, without windows of nothing but blanks.
    """
    lines: list[str] = re.findall(r"[^\n]*\n|[^\n]+", text)
    counts = count_tokens(lines)
    while any(count > max_tokens and len(line) > 1 for line, count in zip(lines, counts.tolist(), strict=True)):
        lines = [
            part
            for line, count in zip(lines, counts.tolist(), strict=True)
            for part in (_halve(line) if count > max_tokens else [line])
        ]
        counts = count_tokens(lines)
    ends = np.cumsum(counts)
    start = 0
    while start < len(lines):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + max_tokens, side="right")))
        window = "".join(lines[start:end])
        if window.strip():
            yield window
        start = end


def _halve(line: str) -> list[str]:
    middle = len(line) // 2
    return [part for part in (line[:middle], line[middle:]) if part]
