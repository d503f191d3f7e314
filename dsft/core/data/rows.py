"""A row of a data set before anyone asked what its columns mean."""

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
