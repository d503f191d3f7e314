"""The prompt templates: the one definition that training and inference share, so that they cannot differ.

A template says which text stands where and what carries loss; `segments` makes token ids of it.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dsft.core.data.examples import Conversation, Example, FimTriple, RawText, Turn, UnusableRowError
from dsft.core.data.fim import find_fim_tokens
from dsft.core.data.segments import Segment, SegmentEncoder
from dsft.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dsft.core.data.formats import LayoutName

TemplateName = Literal["instruction", "deepseek", "chat", "fim", "text"]


@dataclass(frozen=True)
class FimPrompt:
    """The text before and after the place where something is to be filled in."""

    prefix: str
    suffix: str


Prompt = str | Sequence[Turn] | FimPrompt
"""What a model can be asked: an instruction or the beginning of a text, a conversation, or a gap to fill."""

PROBES: tuple[Example, ...] = (
    Conversation((Turn("user", "a"), Turn("assistant", "b", True), Turn("user", "c"), Turn("assistant", "d", True))),
    Conversation((Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b", is_target=True))),
    RawText("a", parse_special=True),
    FimTriple("a", "b", "c"),
)
"""Examples whose rendering tells one version of a template from another."""


class PromptTemplate(ABC):
    """How an example is written down for a model.

    Args:
        tokenizer: The model's tokenizer.

    Attributes:
        name: Name of the template.
        encoder: What makes token ids of its segments.
        stop_token_ids: The tokens that end an answer as it was trained.
    """

    name: TemplateName
    stop_token_ids: list[int]

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.encoder = SegmentEncoder(tokenizer)

    @property
    def bos(self) -> list[int]:
        """Ids that the template puts before a text, exactly those that the tokenizer itself puts there."""
        return [self.encoder.token_id(segment.text) for segment in self.encoder.bos_segments]

    @abstractmethod
    def render(self, example: Example) -> list[Segment]:
        """Return an example as segments; the last one is the end token, and what is learned is marked as target.

        Raises:
            DataError: The template can't write this kind of example.
            UnusableRowError: The template refuses this very example.
        """

    @abstractmethod
    def render_prompt(self, prompt: Prompt, system: str | None = None) -> list[Segment]:
        """Return the segments before the answer: exactly those with which `render` begins.

        Args:
            prompt: What is asked.
            system: System text, where the template has a place for one.

        Raises:
            DataError: The template can't write this kind of prompt.
        """

    def encode_prompt(self, prompt: Prompt, system: str | None = None) -> list[int]:
        """Return the token ids of a prompt, with the beginning-of-text token where the tokenizer has one."""
        return self.encoder.encode_prompt(self.render_prompt(prompt, system))

    @property
    def key(self) -> str:
        """Hash of what the template writes; it changes with any change of the template."""
        rendered = []
        for probe in PROBES:
            try:
                rendered.append(repr(self.render(probe)))
            except (DataError, UnusableRowError):
                rendered.append("refused")
        return hashlib.blake2b("\n".join([self.name, *rendered]).encode(), digest_size=16).hexdigest()

    def _control(self, token: str, *, is_target: bool) -> Segment:
        return Segment(token, is_target, parse_special=True)

    def _refuse(self, what: str) -> DataError:
        return DataError(f"The template {self.name} has no place for {what}.", "Choose another --template, or auto.")


class TurnTemplate(PromptTemplate):
    """A template that writes each user turn and its answer as a block of plain text.

    Attributes:
        end_token: Spelling of the token after each answer.
    """

    end_token: str
    after_response: str = ""
    between_blocks: str = ""

    @abstractmethod
    def _open(self, system: str | None) -> str: ...

    @abstractmethod
    def _ask(self, instruction: str) -> str: ...

    def render(self, example: Example) -> list[Segment]:
        """Return a conversation as segments."""
        if not isinstance(example, Conversation):
            raise self._refuse("a text without an instruction")
        return self._render_turns(example.turns)

    def render_prompt(self, prompt: Prompt, system: str | None = None) -> list[Segment]:
        """Return the segments before the answer to an instruction or to the last turn of a conversation."""
        return self._render_turns(as_turns(prompt, system, self._refuse("a gap to fill")))

    def _render_turns(self, turns: Sequence[Turn]) -> list[Segment]:
        segments = list(self.encoder.bos_segments)
        system = turns[0].text if turns[0].role == "system" else None
        before = self._open(system)
        for turn in turns if system is None else turns[1:]:
            if turn.role == "user":
                segments.append(Segment(before + self._ask(turn.text), False, False))
                before = self.between_blocks
            else:
                segments.append(Segment(turn.text + self.after_response, turn.is_target, False))
                segments.append(self._control(self.end_token, is_target=turn.is_target))
        return segments


class InstructionTemplate(TurnTemplate):
    """`### Instruction:` and `### Response:` as in the seed document; an answer ends with the tokenizer's end token."""

    name: TemplateName = "instruction"
    between_blocks = "\n\n"

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        super().__init__(tokenizer)
        self.end_token = self.encoder.end_token
        self.stop_token_ids = [self.encoder.token_id(self.end_token)]

    def _open(self, system: str | None) -> str:
        return "" if system is None else f"{system}\n\n"

    def _ask(self, instruction: str) -> str:
        return f"### Instruction:\n{instruction}\n\n### Response:\n"


class DeepSeekTemplate(TurnTemplate):
    """The text DeepSeek-Coder's instruct models were trained with."""

    name: TemplateName = "deepseek"
    end_token = "<|EOT|>"  # noqa: S105
    after_response = "\n"
    between_blocks = "\n"
    system_text = (
        "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and "
        "you only answer questions related to computer science. For politically sensitive questions, security and "
        "privacy issues, and other non-computer science questions, you will refuse to answer."
    )

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        super().__init__(tokenizer)
        if self.end_token not in self.encoder.control_tokens:
            raise DataError(
                f"The template deepseek ends answers with {self.end_token}, which this tokenizer does not have.",
                "Use --template instruction, or a DeepSeek-Coder model.",
            )
        self.stop_token_ids = [self.encoder.token_id(self.end_token)]

    def _open(self, system: str | None) -> str:
        return f"{self.system_text if system is None else system}\n"

    def _ask(self, instruction: str) -> str:
        return f"### Instruction:\n{instruction}\n### Response:\n"


class FimTemplate(PromptTemplate):
    """Prefix and suffix between the tokenizer's own fill-in-the-middle tokens; the middle is the answer."""

    name: TemplateName = "fim"

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        super().__init__(tokenizer)
        tokens = find_fim_tokens(self.encoder.control_tokens)
        if tokens is None:
            raise DataError(
                "The template fim needs fill-in-the-middle tokens, and this tokenizer has none that are known.",
                "Take a model that fills in the middle, as DeepSeek-Coder does; to train on texts: --template text.",
            )
        self._tokens = tokens
        self.stop_token_ids = [self.encoder.token_id(self.encoder.end_token)]

    def render(self, example: Example) -> list[Segment]:
        """Return a text with a gap as segments."""
        if not isinstance(example, FimTriple):
            raise self._refuse("a conversation")
        return [
            *self.render_prompt(FimPrompt(example.prefix, example.suffix)),
            Segment(example.middle, True, False),
            self._control(self.encoder.end_token, is_target=True),
        ]

    def render_prompt(self, prompt: Prompt, system: str | None = None) -> list[Segment]:
        """Return the segments before the middle; a mere text is a prefix with nothing after the gap."""
        if system is not None:
            raise self._refuse("a system text")
        if not isinstance(prompt, str | FimPrompt):
            raise self._refuse("a conversation")
        parts = FimPrompt(prompt, "") if isinstance(prompt, str) else prompt
        return [
            *self.encoder.bos_segments,
            self._control(self._tokens.before_prefix, is_target=False),
            Segment(parts.prefix, False, False),
            self._control(self._tokens.before_suffix, is_target=False),
            Segment(parts.suffix, False, False),
            self._control(self._tokens.before_middle, is_target=False),
        ]


class TextTemplate(PromptTemplate):
    """The text as it is, all of it to be learned; BOS and end token that it was written with are not doubled."""

    name: TemplateName = "text"

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        super().__init__(tokenizer)
        self.stop_token_ids = [self.encoder.token_id(self.encoder.end_token)]
        self._bos_text = "".join(segment.text for segment in self.encoder.bos_segments)

    def render(self, example: Example) -> list[Segment]:
        """Return a text as segments."""
        if not isinstance(example, RawText):
            raise self._refuse("prompt and response")
        text = example.text
        if example.parse_special:
            text = text.removeprefix(self._bos_text).removesuffix(self.encoder.end_token)
        return [
            *self.encoder.bos_segments,
            Segment(text, True, example.parse_special),
            self._control(self.encoder.end_token, is_target=True),
        ]

    def render_prompt(self, prompt: Prompt, system: str | None = None) -> list[Segment]:
        """Return the beginning of a text to go on with."""
        if system is not None or not isinstance(prompt, str):
            raise self._refuse("anything but a text")
        return [*self.encoder.bos_segments, Segment(prompt.removeprefix(self._bos_text), False, parse_special=True)]


def get_template(name: str, tokenizer: "PreTrainedTokenizerFast") -> PromptTemplate:
    """Return a template by name.

    Args:
        name: instruction, deepseek, chat, fim or text.
        tokenizer: The tokenizer whose control tokens (and chat template) it uses.

    Raises:
        DataError: There is no such template, or the tokenizer lacks what it needs.
    """
    from dsft.core.data.chat import ChatTemplate

    templates: tuple[type[PromptTemplate], ...] = (
        InstructionTemplate,
        DeepSeekTemplate,
        ChatTemplate,
        FimTemplate,
        TextTemplate,
    )
    template = next((template for template in templates if template.name == name), None)
    if template is None:
        names = ", ".join(template.name for template in templates)
        raise DataError(f"There is no prompt template {name}.", f"Templates are {names}.")
    return template(tokenizer)


def choose_template_name(layout: "LayoutName", tokenizer: "PreTrainedTokenizerFast") -> TemplateName:
    """Return the template that `auto` stands for with a layout."""
    if layout in {"instruction", "prompt/completion"}:
        return "instruction"
    if layout in {"messages", "conversations"}:
        return "chat" if tokenizer.chat_template else "instruction"
    if layout == "source files":
        return "fim" if find_fim_tokens(SegmentEncoder(tokenizer).control_tokens) else "text"
    return "fim" if layout == "fim" else "text"


def as_turns(prompt: Prompt, system: str | None, refusal: DataError) -> list[Turn]:
    """Return a prompt as the turns of a conversation that ends with the user's.

    Raises:
        DataError: `refusal`, for a prompt that is no conversation.
    """
    if isinstance(prompt, FimPrompt):
        raise refusal
    turns = [Turn("user", prompt)] if isinstance(prompt, str) else list(prompt)
    if not turns or turns[-1].role != "user":
        raise DataError("The conversation does not end with a user turn, so there is nothing to answer.", "Add one.")
    return turns if system is None else [Turn("system", system), *turns]
