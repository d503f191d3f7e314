"""A row of a data set before anyone asked what its columns mean."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row as it was found.

    Attributes:
        number: Position in the source, counted from 0 over all rows, unusable ones included.
        where: The place for messages: "data.jsonl:7", "data.parquet row 7", "src/main.py".
        values: Column name to value.
    """

    number: int
    where: str
    values: dict[str, Any]


class BadRow(NamedTuple):
    """A row that can't be used.

    Attributes:
        number: Position in the source, counted from 0 over all rows.
        where: The place for messages.
        reason: What is wrong with it, without any of its content, so that rows can be counted by reason.
    """

    number: int
    where: str
    reason: str


def read_batch(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the columns of each row of an Arrow batch or table, or the reason why a row has none.

    Arrow holds what Python can't: dates after the year 9999, text that is no UTF-8.
    """
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        if batch.num_rows == 1:
            yield f"has a value that can't be read in the column {_find_unreadable(batch)}"
        else:
            for index in range(batch.num_rows):
                yield from read_batch(batch.slice(index, 1))
        return
    yield from rows


def _find_unreadable(batch: Any) -> str:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except (ValueError, OverflowError):
            return str(name)
    return "?"
