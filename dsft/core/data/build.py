"""Tokenizing a whole data set into a store, batch by batch, and counting what became of each row."""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt

from dsft.core.data.cache import StoreWriter
from dsft.core.data.examples import Conversation, Example, RawText, UnusableRowError
from dsft.core.data.formats import Layout
from dsft.core.data.report import MAX_PLACES, DataReport, LengthSummary
from dsft.core.data.rows import BadRow
from dsft.core.data.sources import Source
from dsft.core.data.tokenize import LengthRule, PlacedExample, SampleBatch, SampleMaker
from dsft.core.errors import DataError

BATCH_ROWS = 768
BATCH_CHARACTERS = 1 << 20
"""The tokenizer holds about a hundred bytes for each character of a batch."""


class SampleBuilder:
    """Makes the store of one data set.

    Args:
        source: The rows.
        layout: What their columns mean.
        maker: Makes samples of examples.
        rule: What a sample may be.
        max_samples: Most usable rows to read.
        bad_rows: Whether rows that can't be used end the run or are left out.
        on_rows: Called after each batch with the number of rows read so far.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        maker: SampleMaker,
        rule: LengthRule,
        max_samples: int | None,
        bad_rows: Literal["error", "skip"],
        on_rows: Callable[[int], None],
    ) -> None:
        self._source = source
        self._layout = layout
        self._maker = maker
        self._rule = rule
        self._max_samples = max_samples
        self._bad_rows = bad_rows
        self._on_rows = on_rows
        self._report = DataReport(
            dataset=source.name,
            layout=layout.name,
            columns=list(layout.columns),
            template=maker.template_name,
            files_left_out=dict(source.left_out),
        )
        self._columns: set[str] = set()
        self._first_bad: list[BadRow] = []
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._prompts: list[npt.NDArray[np.uint64]] = []
        self._left_out_lengths: list[int] = []

    def build(self, writer: StoreWriter) -> dict[str, object]:
        """Read and tokenize everything.

        Returns:
            The report as plain values.

        Raises:
            DataError: The data can't be read, or none of it can be used, or rows are bad that may not be.
        """
        started_s = time.perf_counter()
        report = self._report
        with _frozen_collector():
            for samples in self._make_batches():
                self._add(writer, samples)
                self._on_rows(report.num_rows)
        self._check()
        lengths = np.concatenate(self._lengths)
        report.columns = [column for column in self._layout.columns if column in self._columns]
        if self._layout.name != "source files":
            report.unused_columns = sorted(self._columns.difference(self._layout.columns))
        report.num_samples, report.num_tokens = len(lengths), int(lengths.sum())
        report.lengths = LengthSummary.of(lengths)
        report.num_repeated_prompts = report.num_used_rows - len(np.unique(np.concatenate(self._prompts)))
        report.rows_per_s = round(report.num_rows / (time.perf_counter() - started_s), 1)
        return report.as_dict()

    def _make_batches(self) -> Iterator[SampleBatch]:
        """Yield the samples of each batch of rows in order.

        Two batches are in the making while the next is read: the tokenizer does not hold Python's lock, and while one
        batch is unpacked the other keeps its threads busy.
        """
        # How many rows to read depends on what has come of those before.
        num_ahead = 2 if self._max_samples is None else 0
        pending: deque[Future[SampleBatch]] = deque()
        with ThreadPoolExecutor(max_workers=2) as workers:
            for rows in self._read_batches():
                # Once the run is to be refused, only the other bad rows are still looked for.
                if not self._is_refused:
                    pending.append(workers.submit(self._maker.make, rows))
                while len(pending) > num_ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    @property
    def _is_refused(self) -> bool:
        return self._bad_rows == "error" and bool(self._first_bad)

    def _read_batches(self) -> Iterator[list[PlacedExample]]:
        batch: list[PlacedExample] = []
        num_characters = 0
        for row in self._source.rows():
            self._report.num_rows += 1
            if isinstance(row, BadRow):
                self._count_bad(row)
                continue
            self._columns.update(row.values)
            try:
                example = self._layout.parse(row.values)
            except UnusableRowError as error:
                self._count_bad(BadRow(row.number, row.where, error.reason))
                continue
            batch.append(PlacedExample(row.number, row.where, example))
            num_characters += _count_characters(example)
            if len(batch) == self._room_in_batch() or num_characters >= BATCH_CHARACTERS:
                yield batch
                batch, num_characters = [], 0
                if self._room_in_batch() == 0:
                    return
        if batch:
            yield batch

    def _room_in_batch(self) -> int:
        if self._max_samples is None:
            return BATCH_ROWS
        return min(BATCH_ROWS, self._max_samples - self._report.num_used_rows)

    def _count_bad(self, row: BadRow) -> None:
        self._report.count_bad_row(row)
        if len(self._first_bad) < MAX_PLACES:
            self._first_bad.append(row)

    def _add(self, writer: StoreWriter, batch: SampleBatch) -> None:
        report, fate = self._report, batch.fate
        target_counts = writer.add(batch)
        is_last_of_row = np.append(batch.rows[1:] != batch.rows[:-1], True)[: len(batch.rows)]
        report.num_used_rows += int(is_last_of_row.sum())
        report.num_target_tokens += int(target_counts.sum())
        report.num_without_target += int((target_counts == 0).sum())
        report.num_without_end += int((is_last_of_row & ~self._maker.ends_with_learned_stop(batch)).sum())
        report.num_over_length += fate.outcomes["over_length"]
        report.num_no_room += fate.outcomes["no_room"]
        report.num_truncated += fate.outcomes["truncated"]
        report.num_split += fate.outcomes["split"]
        report.num_left_out_windows += fate.outcomes["window_left_out"]
        for row in fate.bad_rows:
            self._count_bad(row)
        self._left_out_lengths += fate.left_out_lengths
        self._lengths.append(batch.lengths)
        self._prompts.append(batch.prompts[is_last_of_row])

    def _check(self) -> None:
        """Refuse data of which nothing, or not everything that must be, can be used."""
        report, name = self._report, self._source.name
        places = ", ".join(f"{row.where} ({row.reason})" for row in self._first_bad)
        more = report.num_bad_rows - len(self._first_bad)
        places += f" and {more} more" if more > 0 else ""
        if self._is_refused:
            rows = "1 row" if report.num_bad_rows == 1 else f"{report.num_bad_rows} rows"
            raise DataError(
                f"{rows} of {name} can't be used: {places}.", "Correct them, or leave them out with --bad-rows skip."
            )
        if report.num_used_rows == 0:
            raise self._nothing_usable(places)
        if report.num_target_tokens == 0:
            raise DataError(f"No token of {name} carries loss, so nothing would be learned.", "Check --template.")

    def _nothing_usable(self, places: str) -> DataError:
        name, report, limit = self._source.name, self._report, self._rule.max_length
        if not self._left_out_lengths:
            reason = "no gap with text in it fits" if report.num_left_out_windows else "there is none"
            return DataError(
                f"No row of {name} can be used: {places or reason}.", "Correct the data, or give another set."
            )
        rows = f"All {len(self._left_out_lengths)} rows" if not report.num_bad_rows else "All usable rows"
        rows_are = f"The one row of {name} is" if report.num_rows == 1 else f"{rows} of {name} are"
        median = int(np.median(self._left_out_lengths))
        found = f"{rows_are} longer than the {limit} tokens of --max-length (median: {median} tokens)"
        if report.num_no_room:
            return DataError(f"{found}, and none has room for its response.", f"Set --max-length {median} or more.")
        return DataError(f"{found}.", f"Set --max-length {median} or more, or --over-length truncate.")


@contextmanager
def _frozen_collector() -> Iterator[None]:
    """Keep the garbage collector from walking all objects of the process again and again: a fifth of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _count_characters(example: Example) -> int:
    if isinstance(example, Conversation):
        return sum(len(turn.text) for turn in example.turns)
    if isinstance(example, RawText):
        return len(example.text)
    return len(example.prefix) + len(example.suffix) + len(example.middle)
