"""A conversation with a model: its turns, what of them fits into the context, and how it ends up as training data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsft.core.data.examples import Turn
from dsft.core.data.prompts import DeepSeekTemplate, InstructionTemplate
from dsft.core.errors import ConfigError, DataError, InputError
from dsft.core.notices import Notify
from dsft.infer.chat_file import put_row
from dsft.infer.config import InferConfig
from dsft.infer.prompts import EncodedPrompt, PromptTooLongError
from dsft.infer.result import InferResult
from dsft.infer.session import Session

_CONTEXT_SHARE = 4
"""At least one part in so many of the context is kept for the answer, if --max-new-tokens asks for that much."""

_PROBE = (Turn("user", "a"), Turn("assistant", "b", is_target=True), Turn("user", "c"))

_AFTER_ANSWER = {template.name: template.after_response for template in (InstructionTemplate, DeepSeekTemplate)}
"""What a template writes behind an answer's text; a model trained with it writes it too."""


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: What was asked.
        answer: What the model said.
        is_cut: Whether the answer was stopped before its end: by the user, a limit or a full context.
    """

    question: str
    answer: str
    is_cut: bool


@dataclass(frozen=True)
class SavedChat:
    """What was written into a file.

    Attributes:
        num_exchanges: Questions with their answers.
        num_cut: Answers among them that were stopped before their end.
        has_replaced: Whether the row took the place of the one saved earlier in this conversation.
    """

    num_exchanges: int
    num_cut: int
    has_replaced: bool


class Chat:
    """A conversation. Making one finds and checks everything but the weights.

    Each question is asked with all that was said before. Where that no longer fits into the model's context, the oldest
    questions are left out with their answers, never the system text.

    Args:
        config: Which model, and how it answers.
        on_notice: Receives sentences the user should read: what was chosen, limited or left out by itself.

    Attributes:
        system: System text; None where there is none.

    Raises:
        ConfigError: The prompt template can't write several turns, or has no place for the system text.
        InputError: Model, tokenizer or settings can't be used.
        NoGpuError: A GPU was demanded and there is none.
    """

    def __init__(self, config: InferConfig, on_notice: Notify) -> None:
        if config.is_raw:
            raise ConfigError(
                "--chat writes question and answer in a template, but --raw asks for none.", "Leave one of them out."
            )
        # The system text is a turn here, because it may change while the model stays.
        self._session = Session(replace(config, system=None), on_notice)
        self._on_notice = on_notice
        self._exchanges: list[Exchange] = []
        self._num_left_out = 0
        self._open_question: str | None = None
        self._saved_rows: dict[Path, list[dict[str, str]]] = {}
        self.system: str | None = None
        self.change_system(config.system)

    @property
    def exchanges(self) -> Sequence[Exchange]:
        """The questions that have an answer, the oldest first, those included that the model no longer sees."""
        return tuple(self._exchanges)

    @property
    def model_name(self) -> str:
        """The model as named or found."""
        return self._session.model_name

    @property
    def is_repeatable(self) -> bool:
        """Whether the same question gets the same answer each time."""
        config = self._session.config
        return not config.is_sampling or config.seed is not None

    @property
    def has_open_question(self) -> bool:
        """Whether the last question got no answer, so that it is no part of the conversation."""
        return self._open_question is not None

    def load(self) -> None:
        """Load the weights.

        Raises:
            ModelError: Weights are missing, damaged, not finite or of another shape.
            DoesNotFitError: The GPU's memory is too small.
        """
        self._session.load()

    def ask(self, question: str, on_text: Callable[[str], None]) -> InferResult:
        """Answer a question, and remember both.

        An answer that an interrupt stops stays as far as it came; one that fails, or that says nothing, does not, nor
        does its question.

        Args:
            question: What is asked.
            on_text: Receives the answer piece by piece, each as soon as it is certain.

        Raises:
            InputError: The question is empty, no text, or too long by itself.
            ModelError: The model's outputs are NaN.
            DoesNotFitError: The GPU's memory is too small.
        """
        self._open_question = question
        prompt = self._encode(question)
        pieces: list[str] = []

        def pass_on(text: str) -> None:
            pieces.append(text)  # before it is shown: an interrupt may come inside that
            on_text(text)

        try:
            result = self._session.answer(prompt, pass_on)
        except KeyboardInterrupt:
            self._remember("".join(pieces), prompt, is_cut=True)
            raise
        self._remember(result.text, prompt, is_cut=result.stop_reason in {"max_new_tokens", "context_full"})
        return result

    def retry(self, on_text: Callable[[str], None]) -> InferResult:
        """Drop the last answer and ask its question again; see `ask`.

        Raises:
            InputError: Nothing was asked yet.
        """
        return self.ask(self.undo(), on_text)

    def undo(self) -> str:
        """Drop the last question, with its answer where it has one, and return it.

        Raises:
            InputError: There is none.
        """
        if self._open_question is not None:
            question, self._open_question = self._open_question, None
            return question
        if not self._exchanges:
            raise InputError("The conversation is empty.", "Ask something first.")
        dropped = self._exchanges.pop()
        self._num_left_out = min(self._num_left_out, len(self._exchanges))
        return dropped.question

    def reset(self) -> None:
        """Begin a new conversation with the same system text."""
        self._exchanges, self._num_left_out, self._open_question, self._saved_rows = [], 0, None, {}

    def change_system(self, text: str | None) -> None:
        """Take another system text from here on, or none.

        Raises:
            ConfigError: The template can't write several turns, or has no place for a system text.
            InputError: It is no text, or fills the context.
        """
        try:
            without = self._session.encode(_PROBE).token_ids
        except DataError as error:
            raise ConfigError(
                f"A chat takes a template that can write several turns: {error.found}",
                "Choose --template instruction, deepseek or chat.",
            ) from error
        if text is not None:
            try:
                prompt = self._session.encode([Turn("system", text), *_PROBE])
            except DataError as error:
                raise ConfigError(
                    f"The template can't write the system text: {error.found}", "Go on without a system text."
                ) from error
            if text.strip() and prompt.token_ids == without:
                raise ConfigError(f"The template {prompt.template} leaves the system text out.", "Go on without one.")
        self.system = text

    def save(self, path: Path) -> SavedChat:
        """Write the conversation into a file of training data, as one row in the layout `messages`.

        A file that is there gets one row more. If this conversation was saved into it before, its row is written anew
        instead, so that a data set does not fill with the beginnings of its own rows.

        Raises:
            InputError: The conversation is empty, or the file is no place for it.
            WriteError: The file can't be written; it is as it was.
        """
        if not self._exchanges:
            raise InputError("There is nothing to save: no question has been answered.", "Ask something first.")
        turns = self._write_turns(self._exchanges)
        row = [{"role": turn.role, "content": turn.text} for turn in turns]
        place = path.expanduser().absolute()
        has_replaced = put_row(place, row, self._saved_rows.get(place))
        self._saved_rows[place] = row
        return SavedChat(len(self._exchanges), sum(exchange.is_cut for exchange in self._exchanges), has_replaced)

    def _encode(self, question: str) -> EncodedPrompt:
        num_left_out = self._num_left_out
        while True:
            seen = self._exchanges[num_left_out:]
            try:
                prompt = self._session.encode([*self._write_turns(seen), Turn("user", question)])
            except PromptTooLongError:
                if not seen:
                    raise
            else:
                if not seen or self._has_room(prompt):
                    break
            num_left_out += 1
        if num_new := num_left_out - self._num_left_out:
            what = "oldest question and its answer" if num_new == 1 else f"{num_new} oldest questions and their answers"
            self._on_notice(f"The {what} no longer fit into the model's context: the model does not see them any more.")
        if not self._has_room(prompt):
            self._session.tell_limit(prompt)
        self._num_left_out = num_left_out
        return prompt

    def _has_room(self, prompt: EncodedPrompt) -> bool:
        if prompt.num_room is None:
            return True
        context = len(prompt.token_ids) + prompt.num_room
        return prompt.num_room >= min(self._session.config.max_new_tokens, context // _CONTEXT_SHARE)

    def _write_turns(self, exchanges: Sequence[Exchange]) -> list[Turn]:
        turns = [] if self.system is None else [Turn("system", self.system)]
        for exchange in exchanges:
            turns += [Turn("user", exchange.question), Turn("assistant", exchange.answer, is_target=True)]
        return turns

    def _remember(self, answer: str, prompt: EncodedPrompt, *, is_cut: bool) -> None:
        # An answer that says nothing is no turn: data sets refuse it, and so do some chat templates.
        if self._open_question is None or not answer.strip():
            return
        after = "" if prompt.template is None else _AFTER_ANSWER.get(prompt.template, "")
        self._exchanges.append(Exchange(self._open_question, answer.removesuffix(after), is_cut))
        self._open_question = None
