"""The tokenizer's own chat template as a prompt template: loss masks by position, control tokens only its own."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from dsft.core.data.examples import Conversation, Example, Turn, UnusableRowError
from dsft.core.data.prompts import Prompt, PromptTemplate, TemplateName, as_turns
from dsft.core.data.segments import Segment
from dsft.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARK = "\ufdd0"
"""A code point that is never text. With a character of the private use area behind it, it stands in the place of a
control token that a message only quotes, so that the template can't mix it up with its own."""

FIRST_QUOTE = 0xE000

PROBE_ANSWER = "\uf8ff"
"""An answer that no template's own text holds."""


class ChatTemplate(PromptTemplate):
    """Conversations in the words of the tokenizer's chat template.

    What the template writes up to the beginning of an answer must not depend on the answer or on what follows;
    otherwise the model would be trained behind a prompt it never gets. An answer ends with the control token that the
    template puts behind it; what the template writes after that belongs to the next prompt.
    """

    name: TemplateName = "chat"

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        super().__init__(tokenizer)
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise DataError(
                "The template chat needs a chat template, and this tokenizer has none.",
                "Use --template instruction, or the tokenizer of a chat model.",
            )
        self._quoted = sorted(self.encoder.control_tokens)
        self._lead = ""
        try:
            probe = self._render_turns([Turn("user", "a"), Turn("assistant", PROBE_ANSWER, is_target=True)])
        except UnusableRowError as error:
            raise DataError(
                f"A question and its answer can't be written with this tokenizer's chat template: {error.reason}.",
                "Use --template instruction, or correct the chat template.",
            ) from error
        self._lead = probe[1].text.partition(PROBE_ANSWER)[0]
        self.stop_token_ids = [self.encoder.encode_prompt(probe)[-1]]

    @property
    def bos(self) -> list[int]:
        """None: the chat template itself writes the beginning-of-text token, if the model wants one."""
        return []

    def render(self, example: Example) -> list[Segment]:
        """Return a conversation as segments."""
        if not isinstance(example, Conversation):
            raise self._refuse("a text without turns")
        return self._render_turns(example.turns)

    def render_prompt(self, prompt: Prompt, system: str | None = None) -> list[Segment]:
        """Return the segments before the answer to the last turn."""
        turns = as_turns(prompt, system, self._refuse("a gap to fill"))
        try:
            return self._render_turns(turns)
        except UnusableRowError as error:
            raise DataError(f"The prompt can't be written: {error.reason}.", "Change the prompt.") from error

    def _render_turns(self, turns: Sequence[Turn]) -> list[Segment]:
        has_quotes = any(self.encoder.control_pattern.search(turn.text) or MARK in turn.text for turn in turns)
        messages = [(turn.role, self._quote(turn.text) if has_quotes else turn.text) for turn in turns]
        is_prompt = turns[-1].role == "user"
        text = self._apply(messages, add_generation_prompt=is_prompt)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        starts = [self._find_start(text, messages[:index]) for index in answers]
        segments: list[Segment] = []
        done = 0
        for index, (start, next_start) in zip(answers, pairwise([*starts, len(text)]), strict=True):
            end = self._find_end(text, messages[index][1], start, next_start)
            segments.append(Segment(text[done:start], False, parse_special=True))
            segments.append(Segment(text[start:end], turns[index].is_target, parse_special=True))
            done = end
        if is_prompt:
            segments.append(Segment(text[done:], False, parse_special=True))
        if not has_quotes:
            return segments
        return [part for segment in segments for part in self._unquote(segment)]

    def _apply(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise UnusableRowError(f"the chat template refuses it: {error}") from error
        except Exception as error:  # whatever Python raises for what a template does
            raise DataError(
                f"The chat template of this tokenizer fails: {type(error).__name__}: {error}.",
                "Use --template instruction, or correct the chat template.",
            ) from error
        return text

    def _find_start(self, text: str, messages_before: Sequence[tuple[str, str]]) -> int:
        prompt = self._apply(messages_before, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise DataError(
                f"The chat template of this tokenizer writes {prompt[-40:]!r} before an answer when it asks for one, "
                f"but {text[max(0, len(prompt) - 40) : len(prompt)]!r} in a finished conversation.",
                "Use --template instruction, or a chat template that writes both alike.",
            )
        return len(prompt)

    def _find_end(self, text: str, answer: str, start: int, next_start: int) -> int:
        """Return where the control token ends that the template puts behind an answer."""
        answer = answer.strip()
        # A short answer could also stand in what the template writes before it.
        lead = len(self._lead) if text.startswith(self._lead, start) else 0
        found = text.find(answer, start + lead, next_start)
        if found < 0:
            raise UnusableRowError("the chat template changes the assistant's text (it may remove reasoning)")
        stop = self.encoder.control_pattern.search(text, found + len(answer), next_start)
        if stop is None:
            raise DataError(
                "The chat template of this tokenizer writes no end token behind an answer, so the model would never "
                "learn to stop.",
                "Use --template instruction, or add the end token to the chat template.",
            )
        return stop.end()

    def _quote(self, text: str) -> str:
        if MARK in text:
            raise UnusableRowError("a message holds the code point U+FDD0, which is no character")
        return self.encoder.control_pattern.sub(
            lambda found: MARK + chr(FIRST_QUOTE + self._quoted.index(found.group())), text
        )

    def _unquote(self, segment: Segment) -> list[Segment]:
        """Return a segment cut at the template's own control tokens, with the quoted ones as text again.

        One without quotes stays whole: what an answer quotes must not change how the prompt before it is tokenized.
        """
        if MARK not in segment.text:
            return [segment]
        parts = []
        done = 0
        for found in [*self.encoder.control_pattern.finditer(segment.text), None]:
            plain = segment.text[done : found.start() if found else len(segment.text)]
            if plain:
                first, *rest = plain.split(MARK)
                plain = first + "".join(self._quoted[ord(quote[0]) - FIRST_QUOTE] + quote[1:] for quote in rest)
                parts.append(Segment(plain, segment.is_target, parse_special=False))
            if found:
                parts.append(Segment(found.group(), segment.is_target, parse_special=True))
                done = found.end()
        return parts
