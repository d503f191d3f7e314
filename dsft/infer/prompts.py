"""From what is asked to the token ids that the model reads, and how it will know that an answer is over."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsft.core.data.prompts import FimPrompt, Prompt, PromptTemplate, TemplateName, get_template
from dsft.core.errors import DataError, InputError, ModelError
from dsft.core.models.find_run import ModelChoice
from dsft.core.models.source import ModelSource
from dsft.core.notices import Notify
from dsft.infer.config import InferConfig, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WITHOUT_SYSTEM: tuple[TemplateName, ...] = ("text", "fim")


@dataclass(frozen=True)
class EncodedPrompt:
    """What the model reads.

    Attributes:
        token_ids: The prompt with its template.
        stop_token_ids: Tokens that end an answer in this form.
        num_room: Tokens that fit into the model's context after it, at least 1; None where it has no limit.
        template: Name of the template; None for a raw prompt.
    """

    token_ids: list[int]
    stop_token_ids: list[int]
    num_room: int | None
    template: TemplateName | None


class PromptEncoder:
    """Writes prompts for a model.

    Args:
        config: What is asked for.
        choice: The model, and the template it was trained with.
        source: The model whose weights read the prompt.
        tokenizer: Its tokenizer.
        on_notice: Receives the reason for a template that nobody chose.
    """

    def __init__(
        self,
        config: InferConfig,
        choice: ModelChoice,
        source: ModelSource,
        tokenizer: "PreTrainedTokenizerFast",
        on_notice: Notify,
    ) -> None:
        self._config = config
        self._choice = choice
        self._source = source
        self._tokenizer = tokenizer
        self._on_notice = on_notice
        self._template: TemplateName | None = None
        self._templates: dict[TemplateName, PromptTemplate] = {}  # making one takes a tenth of a second

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Return a prompt's token ids; a gap to fill is always written in the template fim.

        Raises:
            InputError: The prompt is empty or no text, the template can't write it, or it leaves no room for an answer.
            ModelError: Tokenizer and model do not belong together.
        """
        check_prompt(prompt)
        if self._config.is_raw and isinstance(prompt, str):
            return self._make(self._tokenizer(prompt)["input_ids"], [int(self._tokenizer.eos_token_id)], None)
        name: TemplateName = "fim" if isinstance(prompt, FimPrompt) else self._choose_template()
        if self._config.system is not None and name in _WITHOUT_SYSTEM:
            raise DataError(
                f"The template {name} has no place for a system text.",
                "Leave --system out, or choose another --template.",
            )
        template = self._get_template(name)
        token_ids = template.encode_prompt(prompt, self._config.system)
        return self._make(token_ids, list(template.stop_token_ids), name)

    def encode_gap(self, prompt: FimPrompt, num_wanted: int) -> tuple[EncodedPrompt, int]:
        """Return a gap's token ids; where a text is too long for the context, what is farthest from the gap is cut.

        Args:
            prompt: The text around the gap.
            num_wanted: Tokens that are to fit into the context after it; half of the context is enough for a long text.

        Returns:
            The prompt, and how many tokens of the text were cut: of each side in proportion to what it has.

        Raises:
            InputError, ModelError: As `encode`; the prompt is never too long where the context has any use.
        """
        check_prompt(prompt)
        template = self._get_template("fim")
        segments = template.render_prompt(prompt, self._config.system)
        encoded = template.encoder.encode([segments])
        parts = [part.tolist() for part in np.split(encoded.token_ids, np.cumsum(encoded.lengths)[:-1])]
        sides = [place for place, segment in enumerate(segments) if not segment.parse_special]
        num_positions = self._source.model_config.get("max_position_embeddings")
        before, behind = (len(parts[place]) for place in sides)
        num_cut = 0
        if isinstance(num_positions, int):
            num_room = num_positions - min(num_wanted, num_positions // 2)
            num_excess = sum(map(len, parts)) - num_room
            if 0 < num_excess < before + behind:
                num_cut = num_excess
                cut_before = round(num_cut * before / (before + behind))
                parts[sides[0]] = parts[sides[0]][cut_before:]
                parts[sides[1]] = parts[sides[1]][: behind - (num_cut - cut_before)]
        token_ids = [token_id for part in parts for token_id in part]
        return self._make(token_ids, list(template.stop_token_ids), "fim"), num_cut

    def _get_template(self, name: TemplateName) -> PromptTemplate:
        if name not in self._templates:
            try:
                self._templates[name] = get_template(name, self._tokenizer)
            except DataError as error:
                if name != "fim":
                    raise
                raise DataError(
                    f"{self._choice.name} has no fill-in-the-middle tokens that are known, so it can't fill a gap.",
                    "Take a model that was trained for it, as DeepSeek-Coder, Qwen2.5-Coder and StarCoder were.",
                ) from error
        return self._templates[name]

    def _choose_template(self) -> TemplateName:
        if self._template is None:
            self._template = self._decide_template()
        return self._template

    def _decide_template(self) -> TemplateName:
        demanded, choice = self._config.template, self._choice
        if demanded != "auto":
            if choice.template not in (None, demanded):
                self._on_notice(f"{choice.name} was trained with the template {choice.template}, not {demanded}.")
            return demanded
        if choice.template is not None:
            return choice.template
        name: TemplateName = "chat" if self._tokenizer.chat_template else "instruction"
        reason = "the tokenizer has a chat template" if name == "chat" else "the tokenizer has no chat template"
        self._on_notice(
            f"Template: {name}, because {reason} and {choice.name} records none; --template or --raw change it."
        )
        return name

    def _make(self, token_ids: list[int], stop_token_ids: list[int], name: TemplateName | None) -> EncodedPrompt:
        return EncodedPrompt(token_ids, stop_token_ids, self._find_room(token_ids), name)

    def _find_room(self, token_ids: list[int]) -> int | None:
        name, config = self._source.name, self._source.model_config
        if not token_ids:
            raise InputError("The prompt has no token for the model to go on from.", "Write some text.")
        vocab_size = config.get("vocab_size")
        if isinstance(vocab_size, int) and max(token_ids) >= vocab_size:
            raise ModelError(
                f"The tokenizer gives token {max(token_ids)}, but {name} has only {vocab_size} tokens.",
                "Tokenizer and model must belong together: check --model and --base.",
            )
        num_positions = config.get("max_position_embeddings")
        if not isinstance(num_positions, int):
            return None
        if len(token_ids) >= num_positions:
            raise PromptTooLongError(
                f"The prompt has {len(token_ids)} tokens, and {name} reads at most {num_positions}, "
                "the answer included.",
                "Shorten the prompt.",
            )
        return num_positions - len(token_ids)


class PromptTooLongError(InputError):
    """The prompt fills the model's context."""


def check_prompt(prompt: Prompt) -> None:
    """Refuse a prompt that says nothing or is no text, without a look at any model.

    Raises:
        InputError: It is so.
    """
    if isinstance(prompt, FimPrompt):
        texts = [(prompt.prefix, "The text before the gap"), (prompt.suffix, "The text behind the gap")]
    elif isinstance(prompt, str):
        texts = [(prompt, "The prompt")]
    else:
        texts = [(turn.text, "The conversation") for turn in prompt]
    for text, name in texts:
        check_text(text, name)
    if not any(text.strip() for text, _ in texts):
        hint = 'Write it as the argument, `dsft infer "prompt"`, or pipe it into stdin.'
        if isinstance(prompt, FimPrompt):
            hint = "Give some text before or behind the gap."
        raise InputError("The prompt is empty.", hint)
