"""Reading rows out of one local file, with the place of each: JSON, JSON Lines, CSV and Parquet. Never a whole file.

What a row means is decided in `formats`; what a broken file is, here.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dsft.core.data.rows import read_batch
from dsft.core.errors import DataError

FoundRow = tuple[str, dict[str, Any] | str]
"""Where the row stands, and its columns, or the reason why it has none."""

READ_CHARACTERS = 1 << 20
PARQUET_BATCH_ROWS = 512

_CUT_SLACK = 16
"""A decoding error this close to the end of what was read may only mean that the rest is missing."""


def read_rows(path: Path, name: str) -> Iterator[FoundRow]:
    """Read the rows of a data file in order.

    Args:
        path: The file; its suffix says the format.
        name: How messages name the file.

    Raises:
        DataError: The file can't be read, is in another encoding or is broken, with the line.
    """
    try:
        yield from READERS[path.suffix.lower()](path, name)
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, name) from error
    except OSError as error:
        raise DataError(
            f"{name} can't be read: {error.strerror or error}.", "Check the file and its rights."
        ) from error
    except RecursionError as error:
        raise DataError(f"{name} is nested too deeply.", "Rows hold text, or lists of messages.") from error


_ARRAY_HINT = "It looks like a JSON array: give the file the suffix .json."


def _read_json_lines(path: Path, name: str) -> Iterator[FoundRow]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                value = json.loads(line.rstrip())
            except ValueError as error:
                hint = "Correct that line; JSON Lines holds one object a line."
                if number == 1 and line.lstrip().startswith("["):
                    hint = _ARRAY_HINT
                raise DataError(f"{name}:{number} is broken JSON: {_describe(error)}.", hint) from error
            if number == 1 and isinstance(value, list) and _is_single_line(path):
                raise DataError(f"{name} is an array on one line, not one object a line.", _ARRAY_HINT)
            yield f"{name}:{number}", _require_object(value)


def _is_single_line(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        file.readline()
        return all(line.isspace() for line in file)


def _read_json(path: Path, name: str) -> Iterator[FoundRow]:
    with path.open(encoding="utf-8-sig") as file:
        # Not by lines: an array may be one line of any length.
        character = file.read(1)
        while character.isspace():
            character = file.read(1)
        is_object_a_line = character == "{" and _is_object_a_line("{" + file.readline(), file)
    if character == "[":
        yield from _read_json_array(path, name)
    elif is_object_a_line:
        yield from _read_json_lines(path, name)
    elif character == "{":
        raise DataError(
            f"{name} holds a single JSON object, not rows.",
            "Write the rows as an array [{...}, ...], or one object a line in a .jsonl file.",
        )
    elif character:
        raise DataError(f"{name} is no JSON array: it begins with {character!r}.", "Write an array of objects.")


def _is_object_a_line(first_line: str, others: Iterable[str]) -> bool:
    next_line = next(filter(str.strip, others), "").lstrip()
    try:
        return bool(next_line) and isinstance(json.loads(first_line), dict)
    except ValueError:
        # Two rows, of which the first is broken; an object over several lines would go on behind one of these.
        return next_line.startswith("{") and not first_line.rstrip().endswith(("[", "{", ",", ":"))


def _read_json_array(path: Path, name: str) -> Iterator[FoundRow]:
    """Read the objects of a JSON array one by one, with the line on which each begins."""
    with path.open(encoding="utf-8-sig") as file:
        text = _JsonText(file.read, name)
        text.skip_blanks()
        text.expect("[")
        text.skip_blanks()
        if text.peek() == "]":
            text.expect("]")
        else:
            separator = ","
            while separator == ",":
                text.skip_blanks()
                where = f"{name}:{text.line}"
                yield where, _require_object(text.read_value())
                text.skip_blanks()
                separator = text.expect(",]")
        text.skip_blanks()
        if text.peek():
            raise text.broken("there is more after the array")


class _JsonText:
    """A window on a JSON text that is read as far as needed and forgotten behind the reading position."""

    def __init__(self, read: Callable[[int], str], name: str) -> None:
        self._read = read
        self._name = name
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._position = 0
        self.line = 1

    def peek(self) -> str:
        """Return the next character, or "" at the end."""
        if self._position == len(self._text):
            self._read_more()
        return self._text[self._position : self._position + 1]

    def skip_blanks(self) -> None:
        """Go to the next character that is no white space."""
        while self.peek() and self.peek() in " \t\r\n":
            self._advance(self._position + 1)

    def expect(self, characters: str) -> str:
        """Step over the next character, which must be one of these."""
        found = self.peek()
        if not found or found not in characters:
            raise self.broken(f"{' or '.join(characters)} expected, {repr(found) if found else 'end of file'} found")
        self._advance(self._position + 1)
        return found

    def read_value(self) -> object:
        """Step over the next JSON value and return it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except ValueError as error:
                position = getattr(error, "pos", self._position)
                line = self.line + self._text.count("\n", self._position, position)
                is_cut = "Unterminated string" in str(error) or position >= len(self._text) - _CUT_SLACK
                if is_cut and self._read_more():
                    continue
                raise self.broken(getattr(error, "msg", str(error)).removesuffix(" at"), line) from error
            # A number that ends with the window may go on behind it.
            if end == len(self._text) and self._read_more():
                continue
            self._advance(end)
            return value

    def broken(self, found: str, line: int | None = None) -> DataError:
        """Return the error that says what is wrong at a line, by default the present one."""
        return DataError(
            f"{self._name}:{line or self.line} is broken JSON: {found}.",
            "It must hold an array of objects.",
        )

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        # Doubling keeps the repeated decoding of one long value linear.
        kept = self._text[self._position :]
        more = self._read(max(READ_CHARACTERS, len(kept)))
        self._text, self._position = kept + more, 0
        return bool(more)


def _read_csv(path: Path, name: str) -> Iterator[FoundRow]:
    # The default limit of 131,072 characters a field is below what source files need.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next((fields for fields in reader if fields), [])
            _check_header(header, f"{name}:{reader.line_num}", delimiter)
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield f"{name}:{line}", _match_fields(header, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{name}:{line} is broken CSV: {error}.",
                "Put fields that hold quotes or line ends in double quotes, and double the quotes inside.",
            ) from error


def _check_header(header: list[str], where: str, delimiter: str) -> None:
    _refuse_twin_columns(header, where)
    other = next((mark for mark in ",;\t|" if mark in header[0]), None) if len(header) == 1 else None
    if other is not None:
        raise DataError(
            f"{where} names a single column, {header[0]!r}: its fields seem to be separated by {other!r}, not by "
            f"{delimiter!r}.",
            "Write it with commas; tabs are read from files that end in .tsv.",
        )


def _refuse_twin_columns(names: list[str], where: str) -> None:
    twin = next((name for name, count in Counter(names).items() if count > 1), None)
    if twin is not None:
        raise DataError(f"{where} names the column {twin!r} twice.", "Rename one of them.")


def _match_fields(header: list[str], fields: list[str]) -> dict[str, Any] | str:
    if len(fields) != len(header):
        return "has another number of fields than the header"
    return dict(zip(header, fields, strict=True))


def _read_parquet(path: Path, name: str) -> Iterator[FoundRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # A bounded read buffer instead of whole column chunks keeps memory flat for large row groups.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_CHARACTERS) as file:
            _refuse_twin_columns(file.schema_arrow.names, name)
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for found in read_batch(batch):
                    number += 1
                    yield f"{name} row {number}", found
    except pa.ArrowException as error:
        place = f" after row {number}" if number else ""
        raise DataError(f"{name} is no readable Parquet file{place}: {error}.", "Write the file again.") from error


READERS: dict[str, Callable[[Path, str], Iterator[FoundRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""Suffix of a data file and what reads it."""


def _require_object(value: object) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else "is no JSON object"


def _describe(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} (column {error.colno})"
    return str(error)


def _wrong_encoding(path: Path, name: str) -> DataError:
    """Return the error for a file that is no UTF-8, with the line where that shows."""
    fix = "Convert it, e.g. with: iconv -f LATIN1 -t UTF-8 OLD > NEW"
    with path.open("rb") as file:
        if file.read(2) in {b"\xff\xfe", b"\xfe\xff"}:
            return DataError(f"{name} is in UTF-16, not in UTF-8.", fix.replace("LATIN1", "UTF-16"))
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return DataError(f"{name}:{number} is not in UTF-8 (byte 0x{line[error.start]:02x}).", fix)
    return DataError(f"{name} is not in UTF-8.", fix)
