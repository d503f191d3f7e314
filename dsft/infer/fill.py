"""A gap in a text filled by the model: from what was asked to the prompt, and back into the file."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dsft.core.data.prompts import FimPrompt
from dsft.core.errors import DsftError, WriteError
from dsft.core.notices import Notify
from dsft.core.signals import held_signals
from dsft.infer.config import InferConfig
from dsft.infer.marked_file import MarkedFile, read_marked_file
from dsft.infer.prompts import check_prompt
from dsft.infer.result import InferResult
from dsft.infer.session import Session

_CUT_REASONS = {
    "max_new_tokens": ("it was cut at --max-new-tokens", "Give more with --max-new-tokens N, or put it in by hand."),
    "context_full": ("the model's context was full before its end", "Put it in by hand, or shorten the file."),
}


@dataclass(frozen=True)
class FillRequest:
    """Which gap is to be filled.

    Attributes:
        prefix: The text before the gap; None where a file has the mark.
        suffix: The text behind it; None where there is none, or a file has the mark.
        file: A file with the mark in it, instead of the two texts.
        in_place: Write what fills the gap into the file, in the mark's place.
    """

    prefix: str | None = None
    suffix: str | None = None
    file: Path | None = None
    in_place: bool = False


@dataclass(frozen=True)
class FillResult:
    """What filled a gap.

    Attributes:
        answer: The answer and what it took; its text has the line ends of the file.
        file: The file with the mark, as it was named; None where there was none.
        line: Line of the mark, counted from 1; None where there was no file.
        is_written: Whether the text stands in the file now.
        problem: Why it does not, though that was asked for.
    """

    answer: InferResult
    file: str | None
    line: int | None
    is_written: bool
    problem: DsftError | None


def run_fill(
    config: InferConfig,
    request: FillRequest,
    on_text: Callable[[str], None],
    on_notice: Notify,
    on_written: Callable[[], None] = lambda: None,
) -> FillResult:
    """Fill one gap.

    Args:
        config: Which model answers, and how.
        request: Which gap.
        on_text: Receives what fills it piece by piece, each as soon as it is certain.
        on_notice: Receives sentences the user should read.
        on_written: Called when the text stands in the file, before any signal takes effect.

    Returns:
        What filled the gap. A text that could not be written back is told in it, so that it is not lost.

    Raises:
        InputError: File, mark, model, tokenizer or settings can't be used.
        NoGpuError: A GPU was demanded and there is none.
        DoesNotFitError: The GPU's memory is too small.
    """
    marked = None if request.file is None else read_marked_file(request.file)
    prompt = FimPrompt(request.prefix or "", request.suffix or "") if marked is None else marked.prompt
    check_prompt(prompt)  # before a search for the model
    if marked is not None and request.in_place:
        marked.check_replaceable()
    session = Session(config, on_notice)
    encoded, num_cut = session.encode_gap(prompt)
    if num_cut:
        on_notice(
            f"The text is too long for the model's context: it does not see the {num_cut} tokens farthest from the gap."
        )
    session.tell_limit(encoded)
    fit: Callable[[str], str] = (lambda text: text) if marked is None else marked.fit
    answer = session.answer(encoded, lambda text: on_text(fit(text)))
    answer = replace(answer, text=fit(answer.text))
    problem = None
    if marked is not None and request.in_place:
        problem = _write_back(marked, answer, on_written)
    is_written = request.in_place and problem is None
    if marked is None:
        return FillResult(answer, None, None, is_written, problem)
    return FillResult(answer, marked.name, marked.line, is_written, problem)


def _write_back(marked: MarkedFile, answer: InferResult, on_written: Callable[[], None]) -> DsftError | None:
    """Put an answer in the mark's place; return why that was not done."""
    reason, fix = _CUT_REASONS.get(answer.stop_reason, (None, ""))
    if reason is not None:
        return WriteError(f"The text was not written into {marked.name}: {reason}.", fix)
    try:
        with held_signals():
            marked.replace_mark(answer.text)
            on_written()
    except DsftError as error:
        return error
    return None
