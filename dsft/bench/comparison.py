"""Rows against those of an earlier result: its record read and checked, and the ratios, new by old."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsft.bench.result import FORMAT, BenchResult
from dsft.core.errors import ConfigError

_COMPARED = {
    "tok_per_s": ("speed", "tok_per_s"),
    "step_s": ("speed", "step_s", "median"),
    "reserved_bytes": ("measured", "reserved_bytes"),
    "device_bytes": ("measured", "device_bytes"),
}
"""The figures that are compared, each with its place in a row."""

_MOST = 1e30
"""No figure of a record comes near this; larger ones, infinity among them, are damage."""


@dataclass(frozen=True)
class RowComparison:
    """A row against the row of the same name in an earlier result, new by old; None where either lacks the figure.

    Attributes:
        name: The rows' name.
        tok_per_s: Above 1 is faster.
        step_s: Below 1 is faster.
        reserved_bytes: Below 1 is smaller.
        device_bytes: Below 1 is smaller.
    """

    name: str
    tok_per_s: float | None
    step_s: float | None
    reserved_bytes: float | None
    device_bytes: float | None


def read_record(path: Path) -> dict[str, Any]:
    """Read what `dsft bench --json` or `--output` wrote.

    Raises:
        ConfigError: It can't be read, is no such record, or a figure that is compared is no number.
    """
    fix = "Give a result of dsft bench --json."
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--compare: {path} can't be read: {error.strerror}.", fix) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--compare: {path} is no JSON.", fix) from error
    rows = record.get("rows") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(_is_named(row) for row in rows):
        raise ConfigError(f"--compare: {path} is no result of dsft bench.", fix)
    if record.get("format") != FORMAT:
        raise ConfigError(
            f"--compare: {path} has format {record.get('format')}, and this version reads {FORMAT}.",
            "Run the older measurement again.",
        )
    for row in rows:
        for place in _COMPARED.values():
            try:
                _read_figure(row, place)
            except ValueError as error:
                raise ConfigError(f"--compare: {path}: {error} in the row {row['name']!r}.", fix) from error
    return record


def compare_results(result: BenchResult, old: Mapping[str, Any]) -> list[RowComparison]:
    """Compare rows by name with those of an earlier record; rows that only one of them has are left out."""
    before = {row["name"]: row for row in old["rows"]}
    return [_compare_row(asdict(row), before[row.name]) for row in result.rows if row.name in before]


def _compare_row(new: Mapping[str, Any], old: Mapping[str, Any]) -> RowComparison:
    ratios: dict[str, float | None] = {}
    for figure, place in _COMPARED.items():
        now, then = _read_figure(new, place), _read_figure(old, place)
        ratios[figure] = now / then if now and then else None
    return RowComparison(new["name"], **ratios)


def _is_named(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("name"), str)


def _read_figure(row: Mapping[str, Any], place: tuple[str, ...]) -> float | None:
    """Return a figure of a row, None where the row lacks it.

    Raises:
        ValueError: What stands there is no figure.
    """
    value: Any = row
    for depth, key in enumerate(place):
        if not isinstance(value, Mapping):
            raise ValueError(f"{'.'.join(place[:depth])} holds no figures")
        value = value.get(key)
        if value is None:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MOST:
        raise ValueError(f"{'.'.join(place)} is no figure")
    return float(value)
