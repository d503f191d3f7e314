"""Many prompts of a file answered in groups of like length, in an order that a later process can go on from."""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsft.core.errors import InputError, ModelError
from dsft.infer.batch_events import BatchListener, BatchProgress, BatchResult
from dsft.infer.batch_groups import GroupedAnswers
from dsft.infer.batch_journal import Journal, check_output, open_journal
from dsft.infer.batch_rows import AskedRow, RowProblem, find_misfit, read_asked_rows, record_problem
from dsft.infer.config import InferConfig
from dsft.infer.result import InferResult
from dsft.infer.session import Session

_MOST_TOLD = 20
"""So many bad rows are told one by one; all of them stand among the answers."""

_GROUPS_A_WINDOW = 4
"""Where answers are given out in order as they come, rows are sorted by length only within so many groups."""


@dataclass(frozen=True)
class BatchRequest:
    """Which prompts are to be answered, and where the answers go.

    Attributes:
        file: The prompts.
        output: The file of answers; None is stdout.
        batch_size: Most prompts at once; None is as many as the model takes.
    """

    file: Path
    output: Path | None = None
    batch_size: int | None = None


def run_batch(config: InferConfig, request: BatchRequest, listener: BatchListener) -> BatchResult:
    """Answer the prompts of a file.

    Args:
        config: Which model answers, and how.
        request: Which prompts, and where the answers go.
        listener: Who is told what happens.

    Raises:
        InputError: File, output, model, tokenizer or settings can't be used, or no row can be asked.
        NoGpuError: A GPU was demanded and there is none.
        DoesNotFitError: The GPU's memory is too small for the model.
        ModelError: The model can't be loaded, or it has answered no row and its outputs are NaN.
        WriteError: The answers can't be written; those that were kept stay.
    """
    if request.output is not None:
        check_output(request.output)
    rows, digest = read_asked_rows(request.file)
    session = Session(config, listener.on_notice)
    rows, lengths = _measure(rows, session)
    _tell_bad_rows(rows, request.file, listener)
    seed = secrets.randbits(32) if config.is_sampling and config.seed is None else config.seed
    if request.output is None:
        return _Batch(session, rows, lengths, request, listener, None, seed).run()
    header = {"settings": _list_settings(session), "rows": digest, "seed": seed}
    with open_journal(request.output, header, listener.on_notice) as journal:
        return _Batch(session, rows, lengths, request, listener, journal, journal.header["seed"]).run()


class _Batch:
    """A batch under way."""

    def __init__(
        self,
        session: Session,
        rows: Sequence[AskedRow],
        lengths: Mapping[int, int],
        request: BatchRequest,
        listener: BatchListener,
        journal: Journal | None,
        seed: int | None,
    ) -> None:
        self._session = session
        self._rows = rows
        self._lengths = lengths
        self._request = request
        self._listener = listener
        self._journal = journal
        self._seed = seed
        self._problems = {row.line: row.problem for row in rows if row.problem is not None}
        resumed = set() if journal is None else journal.lines - self._problems.keys()
        self._pending = [row for row in rows if row.prompt is not None and row.line not in resumed]
        self._progress = BatchProgress(len(rows), len(resumed), 0, len(self._problems))
        self._num_prompt_tokens = 0
        self._records: dict[int, Mapping[str, Any]] = {}  # where they go to stdout: those that wait for their turn
        self._turns = iter(rows)
        self._next = next(self._turns, None)

    def run(self) -> BatchResult:
        """Answer what is left, and bring all of it to its place."""
        if self._progress.num_resumed:
            resumed = "1 row was" if self._progress.num_resumed == 1 else f"{self._progress.num_resumed} rows were"
            self._listener.on_notice(f"{resumed} answered before; {len(self._pending)} to go.")
        size = self._choose_size() if self._pending else 1
        started_s = time.perf_counter()
        self._listener.on_progress(self._progress)
        self._give_out()
        answers = GroupedAnswers(
            self._answer_group,
            self._take_failure,
            self._listener.on_notice,
            has_answered=self._progress.num_resumed > 0,
        )
        for window in self._cut_windows(size):
            answers.answer(sorted(window, key=lambda row: -self._lengths[row.line]), size)
        answers.finish()
        duration_s = time.perf_counter() - started_s
        if self._journal is not None:
            self._journal.finish(self._order())
        return self._summarize(duration_s)

    def _choose_size(self) -> int:
        demanded, most = self._request.batch_size, self._session.max_rows
        if demanded is not None and demanded > most:
            self._listener.on_notice(f"--batch-size {demanded}: this model answers at most {most} at once.")
        return most if demanded is None else min(demanded, most)

    def _cut_windows(self, size: int) -> Iterator[list[AskedRow]]:
        if self._journal is not None:
            yield self._pending
            return
        width = size * _GROUPS_A_WINDOW
        for start in range(0, len(self._pending), width):
            yield self._pending[start : start + width]

    def _answer_group(self, group: Sequence[AskedRow], on_answered: Callable[[AskedRow], None]) -> None:
        def take(index: int, result: InferResult) -> None:
            self._take_answer(group[index], result)
            on_answered(group[index])

        prompts = [self._session.encode(row.prompt) for row in group if row.prompt is not None]
        self._session.answer_all(prompts, take, seed=self._seed_of(group))

    def _seed_of(self, group: Sequence[AskedRow]) -> int | None:
        # Groups that shared a seed would draw the same numbers, and the same prompt in each get the same answer.
        if self._seed is None:
            return None
        text = " ".join(map(str, [self._seed, *(row.line for row in group)]))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

    def _take_answer(self, row: AskedRow, result: InferResult) -> None:
        record = row.tags | {
            "text": result.text,
            "stop_reason": result.stop_reason,
            "num_prompt_tokens": result.num_prompt_tokens,
            "num_new_tokens": result.num_new_tokens,
        }
        if self._journal is None:
            self._records[row.line] = record
        else:
            self._journal.append(record)
        done = self._progress
        self._num_prompt_tokens += result.num_prompt_tokens
        num_new_tokens = done.num_new_tokens + result.num_new_tokens
        self._progress = replace(done, num_answered=done.num_answered + 1, num_new_tokens=num_new_tokens)
        self._give_out()
        self._listener.on_progress(self._progress)

    def _take_failure(self, row: AskedRow, problem: RowProblem) -> None:
        self._problems[row.line] = problem
        self._progress = replace(self._progress, num_failed=self._progress.num_failed + 1)
        self._listener.on_bad_row(_describe_bad_row(self._request.file, row.line, problem))
        self._give_out()
        self._listener.on_progress(self._progress)

    def _give_out(self) -> None:
        """Give out the records whose turn has come, where there is no output file."""
        while self._journal is None and self._next is not None:
            problem = self._problems.get(self._next.line)
            record = (
                self._records.pop(self._next.line, None) if problem is None else record_problem(self._next, problem)
            )
            if record is None:
                return
            self._listener.on_record(record)
            self._next = next(self._turns, None)

    def _order(self) -> Iterator[int | Mapping[str, Any]]:
        for row in self._rows:
            problem = self._problems.get(row.line)
            yield row.line if problem is None else record_problem(row, problem)

    def _summarize(self, duration_s: float) -> BatchResult:
        done, output = self._progress, self._request.output
        return BatchResult(
            num_rows=done.num_rows,
            num_answered=done.num_resumed + done.num_answered,
            num_resumed=done.num_resumed,
            num_failed=done.num_failed,
            num_prompt_tokens=self._num_prompt_tokens,
            num_new_tokens=done.num_new_tokens,
            duration_s=duration_s,
            tok_per_s=done.num_new_tokens / duration_s if done.num_new_tokens else None,
            output=None if output is None else str(output),
            model=self._session.model_name,
            base=self._session.base_name,
            seed=self._seed if self._session.config.is_sampling else None,
        )


def _measure(rows: Sequence[AskedRow], session: Session) -> tuple[list[AskedRow], dict[int, int]]:
    """Return the rows with what the model can't read marked as a problem, and how many tokens each of the others has.

    The tokens themselves are not kept: those of a long file would need more memory than its text.

    Raises:
        ModelError: Tokenizer and model do not belong together.
    """
    measured, lengths = [], {}
    for row in rows:
        problem = row.problem or find_misfit(row, session.config)
        if problem is None and row.prompt is not None:
            try:
                lengths[row.line] = len(session.encode(row.prompt).token_ids)
            except ModelError:
                raise
            except InputError as error:
                problem = RowProblem.of(error)
        measured.append(row if problem is None else replace(row, prompt=None, problem=problem))
    return measured, lengths


def _tell_bad_rows(rows: Sequence[AskedRow], file: Path, listener: BatchListener) -> None:
    bad = [(row, row.problem) for row in rows if row.problem is not None]
    told = [_describe_bad_row(file, row.line, problem) for row, problem in bad]
    if len(bad) == len(rows):
        fix = bad[0][1].fix or 'A line holds an object with prompt, instruction or messages, e.g. {"prompt": "..."}.'
        raise InputError(f"{file} has no row that can be asked; the first: {told[0]}", fix)
    for sentence in told[:_MOST_TOLD]:
        listener.on_bad_row(sentence)
    if len(told) > _MOST_TOLD:
        listener.on_bad_row(f"{len(told) - _MOST_TOLD} more rows of {file} can't be asked; the answers name them all.")


def _describe_bad_row(file: Path, line: int, problem: RowProblem) -> str:
    return f"{file}:{line}: {problem.found.removesuffix('.')}."


def _list_settings(session: Session) -> dict[str, Any]:
    """Return all that an answer depends on beside its row, as JSON has it."""
    config = session.config
    return {
        "model": session.model_name,
        "base": session.base_name,
        "fingerprint": session.fingerprint(),
        "template": config.template,
        "raw": config.is_raw,
        "system": config.system,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "repetition_penalty": config.repetition_penalty,
        "seed": config.seed,
        "stop": list(config.stop),
        "dtype": config.dtype,
        "load_in_4bit": config.use_4bit,
    }
