"""Colours for an answer that still comes in: text is never changed, moved or drawn twice, only put between colours."""

import time
from typing import Any

from rich.color import ColorSystem
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax

from dsft.infer.code_block import Part

CODE_THEME = ANSISyntaxTheme(
    {
        ("Comment",): Style(dim=True, italic=True),
        ("Keyword",): Style(color="magenta"),
        ("Operator", "Word"): Style(color="magenta"),
        ("Literal", "String"): Style(color="green"),
        ("Literal", "String", "Interpol"): Style(color="cyan"),
        ("Literal", "Number"): Style(color="cyan"),
        ("Name", "Function"): Style(color="blue", bold=True),
        ("Name", "Class"): Style(color="blue", bold=True),
        ("Name", "Decorator"): Style(color="yellow"),
        ("Name", "Builtin"): Style(color="cyan"),
        ("Name", "Tag"): Style(color="blue"),
        ("Name", "Attribute"): Style(color="cyan"),
    }
)
"""Of the terminal's own sixteen colours, so that it reads on dark and light grounds."""

_FENCE_STYLE = Style(dim=True)

_WITHIN_LINE_INTERVAL_S = 0.05
"""A line that comes slowly is shown word by word, but not examined anew for each token of a fast one."""

_MAX_WINDOW_CHARS = 2_000
"""From here on a lexer begins anew at a line that looks like a beginning, so that a long block is not ever slower."""

_HARD_WINDOW_CHARS = 20_000
"""From here on it begins anew anywhere: at worst colours are wrong."""


class AnswerPainter:
    """Puts colours into the fenced blocks of an answer.

    Attributes:
        reset_code: What takes the terminal back to its own colours, should a text not have been written to its end.
    """

    def __init__(self) -> None:
        self._block: _BlockPainter | None = None
        self.reset_code = ""

    def paint(self, part: Part) -> str:
        """Return what can be shown with one more part of the answer."""
        if part.kind != "prose":
            self.reset_code = "\x1b[0m"
        if part.kind == "indent":
            return part.text  # the line before it has been shown to its end
        if part.kind == "code":
            if self._block is None:
                self._block = _BlockPainter(part.language)
            return self._block.push(part.text)
        shown = self.flush()
        return shown + (_style(part.text, _FENCE_STYLE) if part.kind == "fence" else part.text)

    def flush(self) -> str:
        """Return what was held back."""
        block, self._block = self._block, None
        return "" if block is None else block.flush()


class _BlockPainter:
    """Colours one block of code.

    A word is held back until the next one begins, or its line ends: only then it is known what it is. Colours once
    written stay, even where a lexer would later take another. A line's end is always written at once.
    """

    def __init__(self, language: str) -> None:
        # A lexer's tokens only say where colours go; the text that is shown is always the one that came.
        self._lexer: Any = Syntax("", language).lexer if language else None
        self._text = ""  # since the place where the lexer begins
        self._num_shown = 0
        self._shown_s = time.monotonic()

    def push(self, text: str) -> str:
        if self._lexer is None:
            return text
        self._text += text
        now_s = time.monotonic()
        if "\n" not in text and now_s - self._shown_s < _WITHIN_LINE_INTERVAL_S:
            return ""
        self._shown_s = now_s
        tokens = self._find_tokens()
        painted = self._show(tokens, self._find_end(tokens))
        self._begin_anew(tokens)
        return painted

    def flush(self) -> str:
        return "" if self._lexer is None else self._show(self._find_tokens(), len(self._text))

    def _find_tokens(self) -> list[tuple[int, Any, str]]:
        # Lexers know no line ends but \n, and expect one at the end.
        return list(self._lexer.get_tokens_unprocessed(self._text.replace("\r", " ") + "\n"))

    def _find_end(self, tokens: list[tuple[int, Any, str]]) -> int:
        """Return up to where the text can be shown: whole lines, and of the last one what a lexer is sure of."""
        end = len(self._text)
        line_start = max(self._text.rfind("\n") + 1, self._num_shown)
        for index, kind, value in tokens:
            if line_start <= index < end:
                # A text in quotes is to many lexers an error until it is closed. A comment only gets longer.
                is_sure = index + len(value) < end or kind[:1] == ("Comment",)
                if kind[:1] == ("Error",) or not is_sure:
                    return index
        return end

    def _show(self, tokens: list[tuple[int, Any, str]], end: int) -> str:
        start, self._num_shown = self._num_shown, end
        shown = []
        for index, kind, value in tokens:
            token_start, token_end = max(index, start), min(index + len(value), end)
            if token_start < token_end:
                shown.append(self._text[start:token_start])  # a place that the lexer has left out
                shown.append(_style(self._text[token_start:token_end], CODE_THEME.get_style_for_token(kind)))
                start = token_end
        return "".join([*shown, self._text[start:end]])

    def _begin_anew(self, tokens: list[tuple[int, Any, str]]) -> None:
        if len(self._text) < _MAX_WINDOW_CHARS:
            return
        line_ends = [
            index + len(value) for index, kind, value in tokens if kind[:1] == ("Text",) and value[-1:] == "\n"
        ]
        places = [end for end in line_ends if end <= self._num_shown and self._text[end : end + 1].strip()]
        place = places[-1] if places else self._num_shown if len(self._text) > _HARD_WINDOW_CHARS else 0
        self._text = self._text[place:]
        self._num_shown -= place


def _style(text: str, style: Style) -> str:
    """Return a text in a style; line ends stay outside it."""
    lines = text.split("\n")
    return "\n".join(style.render(line, color_system=ColorSystem.STANDARD) if line else "" for line in lines)
