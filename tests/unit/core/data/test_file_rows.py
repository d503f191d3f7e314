"""Rows of one file with their lines, and what is said of broken ones."""

import codecs
import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsft.core.data import file_rows
from dsft.core.data.file_rows import FoundRow, read_rows
from dsft.core.errors import DataError, ExitCode

ROW = '{"instruction": "a", "output": "b"}'
VALUES = {"instruction": "a", "output": "b"}
BROKEN = '{"instruction": "a", "output": }'

Read = Callable[[str, str | bytes], list[FoundRow]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write a file and read its rows."""

    def write_and_read(name: str, content: str | bytes) -> list[FoundRow]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_rows(path, name))

    return write_and_read


def error_of(read: Read, name: str, content: str | bytes) -> str:
    with pytest.raises(DataError) as caught:
        read(name, content)
    assert caught.value.exit_code == ExitCode.WRONG_INPUT
    assert caught.value.fix
    return caught.value.found


def lines_of(rows: list[FoundRow]) -> list[int]:
    return [int(where.rpartition(":")[2]) for where, _ in rows]


# JSON Lines


@pytest.mark.parametrize("name", ["f.jsonl", "f.ndjson", "f.JSONL"])
def test_each_line_is_a_row(read: Read, name: str):
    assert read(name, f"{ROW}\n{ROW}") == [(f"{name}:1", VALUES), (f"{name}:2", VALUES)]


@pytest.mark.parametrize("name", ["f.jsonl", "f.json"])
def test_a_broken_line_7_is_named(read: Read, name: str):
    content = "\n".join([*[ROW] * 6, BROKEN, ROW])
    assert error_of(read, name, content) == f"{name}:7 is broken JSON: Expecting value (column 32)."


def test_an_unfinished_line_is_broken_where_it_ends(read: Read):
    assert error_of(read, "f.jsonl", f"{ROW[:-1]}\n{ROW}\n").endswith("delimiter (column 35).")


def test_rows_before_the_broken_line_are_read(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_text(f"{ROW}\n{ROW}\n{BROKEN}\n")
    rows = read_rows(path, "f.jsonl")
    assert [next(rows), next(rows)] == [("f.jsonl:1", VALUES), ("f.jsonl:2", VALUES)]
    with pytest.raises(DataError, match=r"^f\.jsonl:3 "):
        next(rows)


def test_blank_lines_count_as_lines_only(read: Read):
    assert lines_of(read("f.jsonl", f"\n{ROW}\n  \n\n{ROW}\n\n")) == [2, 5]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_line_ends_and_a_byte_order_mark_do_not_matter(read: Read, line_end: str, mark: bytes):
    content = mark + line_end.join([ROW, "", ROW, ""]).encode()
    assert read("f.jsonl", content) == [("f.jsonl:1", VALUES), ("f.jsonl:3", VALUES)]


def test_line_separators_inside_a_text_end_no_line(read: Read):
    text = "a\u2028b\u0085c\x0cd"
    rows = read("f.jsonl", f"{json.dumps({'text': text}, ensure_ascii=False)}\n{ROW}\n")
    assert rows == [("f.jsonl:1", {"text": text}), ("f.jsonl:2", VALUES)]


def test_a_value_that_is_no_object_is_no_row(read: Read):
    reasons = [found for _, found in read("f.jsonl", f'1\n"a"\n[{ROW}]\nnull\n')]
    assert reasons == ["is no JSON object"] * 4


def test_an_array_called_jsonl_is_told_apart(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_text(f"[\n{ROW}\n]")
    with pytest.raises(DataError) as caught:
        list(read_rows(path, "f.jsonl"))
    assert ".json" in caught.value.fix and "array" in caught.value.fix


@pytest.mark.parametrize("content", [f"[{ROW}, {ROW}]", f"[{ROW}]\n \n", "[]"])
def test_an_array_on_one_line_called_jsonl_is_told_apart(tmp_path: Path, content: str):
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path, "f.jsonl"))
    assert caught.value.found == "f.jsonl is an array on one line, not one object a line."
    assert "JSON array" in caught.value.fix and ".json" in caught.value.fix


def test_an_array_before_other_lines_is_only_a_bad_row(read: Read):
    assert read("f.jsonl", f"[{ROW}]\n{ROW}\n") == [("f.jsonl:1", "is no JSON object"), ("f.jsonl:2", VALUES)]


@pytest.mark.parametrize("name", ["f.jsonl", "f.json"])
def test_endless_nesting_is_an_error_of_the_file(read: Read, name: str):
    assert error_of(read, name, "[" * 100_000) == f"{name} is nested too deeply."


# Encodings


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv"])
def test_another_encoding_is_named_with_its_line(read: Read, name: str):
    # The bytes are far behind what is read at first, and the line is that of the byte all the same.
    content = b"\n" * 20_000 + b'{"text": "caf\xe9"}\n'
    prefix = {"f.json": b"[", "f.csv": b"a,b"}.get(name, b"")
    assert error_of(read, name, prefix + content) == f"{name}:20001 is not in UTF-8 (byte 0xe9)."


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv"])
def test_utf_16_is_called_by_its_name(read: Read, name: str, encoding: str):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    assert error_of(read, name, mark + ROW.encode(encoding)) == f"{name} is in UTF-16, not in UTF-8."


# JSON


def test_the_objects_of_an_array_have_the_lines_on_which_they_begin(read: Read):
    content = f'\ufeff\r\n[\r\n{ROW}, {ROW},\r\n\r\n{{\r\n"instruction": "a",\r\n"output": "b"}}\r\n,{ROW}\r\n]\r\n'
    rows = read("f.json", content)
    assert [found for _, found in rows] == [VALUES] * 4
    assert lines_of(rows) == [3, 3, 5, 8]


def test_an_array_is_read_through_a_small_window(read: Read, monkeypatch: pytest.MonkeyPatch):
    """Wherever the window ends: in a number, an escape, a literal, a surrogate pair, blanks."""
    values: list[Any] = [
        {"text": 'é\\"\n\U0001f600', "list": [1, 23.5e-7, True, None, {"a": {}}]},
        -1234567,
        {},
        "",
        False,
        {"x" * 50: "y" * 100},
    ]
    expected = [value if isinstance(value, dict) else "is no JSON object" for value in values]
    for indent in (None, 3):
        content = json.dumps(values, indent=indent)
        for size in range(1, 40):
            monkeypatch.setattr(file_rows, "READ_CHARACTERS", size)
            assert [found for _, found in read("f.json", content)] == expected, (indent, size)


def test_a_broken_array_is_named_with_its_line_through_a_small_window(read: Read, monkeypatch: pytest.MonkeyPatch):
    content = "[\n" + ",\n".join([*[ROW] * 5, BROKEN, ROW]) + "\n]"
    for size in (1, 7, 50, 1 << 20):
        monkeypatch.setattr(file_rows, "READ_CHARACTERS", size)
        assert error_of(read, "f.json", content) == "f.json:7 is broken JSON: Expecting value."


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (f"[\n{ROW},\n{ROW}\n", "f.json:4 is broken JSON: , or ] expected, end of file found."),
        (f"[\n{ROW}\n{ROW}]", "f.json:3 is broken JSON: , or ] expected, '{' found."),
        (f"[\n{ROW},\n]", "f.json:3 is broken JSON: Expecting value."),
        (f'[\n{ROW},\n{{"text": "never ends\n', "f.json:3 is broken JSON: Invalid control character."),
        (f'[\n{ROW},\n{{"text": "never ends', "f.json:3 is broken JSON: Unterminated string starting."),
        (f"[{ROW}]\n]", "f.json:2 is broken JSON: there is more after the array."),
        (ROW, "f.json holds a single JSON object, not rows."),
        ('{\n "data": [\n' + ROW + "]}", "f.json holds a single JSON object, not rows."),
        ('{"data": [\n' + ROW + "]}", "f.json holds a single JSON object, not rows."),
        ('"text"', "f.json is no JSON array: it begins with '\"'."),
        (f"{ROW[:-1]}\n{ROW}\n", "f.json:1 is broken JSON: Expecting ',' delimiter (column 35)."),
    ],
)
def test_what_is_no_array_of_rows_is_said(read: Read, content: str, found: str):
    assert error_of(read, "f.json", content) == found


def test_json_with_an_object_a_line_is_json_lines(read: Read):
    assert read("f.json", f"\ufeff\n{ROW}\n\n{ROW}\n") == [("f.json:2", VALUES), ("f.json:4", VALUES)]


@pytest.mark.parametrize("content", ["[]", " [ \n ] ", "\n \n", "\ufeff"])
def test_nothing_in_it_is_no_row(read: Read, content: str):
    assert read("f.json", content) == []


# CSV


def test_fields_with_line_ends_keep_the_line_numbers_right(read: Read):
    content = '\ninstruction,output\n"a\nb","c ""d"""\n\ne,"f\r\ng\n"\r\nh,i\n'
    assert read("f.csv", content) == [
        ("f.csv:3", {"instruction": "a\nb", "output": 'c "d"'}),
        ("f.csv:6", {"instruction": "e", "output": "f\r\ng\n"}),
        ("f.csv:9", {"instruction": "h", "output": "i"}),
    ]


def test_any_text_survives_csv(read: Read):
    choose = random.Random(3)
    texts = ["".join(choose.choices('ab ,;"\n\r\té\U0001f600', k=30)) for _ in range(200)]
    file = io.StringIO()
    csv.writer(file).writerows([["instruction", "output"], *([text, text[::-1]] for text in texts)])
    rows = read("f.csv", "\ufeff" + file.getvalue())
    assert [found for _, found in rows] == [{"instruction": text, "output": text[::-1]} for text in texts]


def test_a_field_may_be_longer_than_the_csv_library_s_default(read: Read):
    text = "x" * 200_000
    assert read("f.csv", f"text\n{text}\n") == [("f.csv:2", {"text": text})]


def test_tabs_separate_in_tsv(read: Read):
    assert read("f.tsv", "a\tb\n1\t2,3\n") == [("f.tsv:2", {"a": "1", "b": "2,3"})]


def test_a_row_with_another_number_of_fields_is_no_row(read: Read):
    rows = read("f.csv", "a,b\n1\n1,2\n1,2,3\n")
    reason = "has another number of fields than the header"
    assert rows == [("f.csv:2", reason), ("f.csv:3", {"a": "1", "b": "2"}), ("f.csv:4", reason)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('a,b\n1,2\n3,"4\n5,6\n', "f.csv:3 is broken CSV: unexpected end of data."),
        ('a,b\n"1"2,3\n', "f.csv:2 is broken CSV: ',' expected after '\"'."),
        ("\na,b,a\n1,2,3\n", "f.csv:2 names the column 'a' twice."),
    ],
)
def test_broken_csv_is_named_with_the_line_where_its_row_begins(read: Read, content: str, found: str):
    assert error_of(read, "f.csv", content) == found


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("f.csv", "q;a\n1,5;2\n", "f.csv:1 names a single column, 'q;a': its fields seem to be separated by ';'"),
        ("f.csv", "\nq\ta\n1\t2\n", "f.csv:2 names a single column, 'q\\ta': its fields seem to be separated by '\\t'"),
        ("f.tsv", "q,a\n1,2\n", "f.tsv:1 names a single column, 'q,a': its fields seem to be separated by ','"),
    ],
)
def test_another_delimiter_is_named(read: Read, name: str, content: str, found: str):
    expected = "'\\t'" if name == "f.tsv" else "','"
    assert error_of(read, name, content) == f"{found}, not by {expected}."


@pytest.mark.parametrize("content", ["a,b\n", "\n\n", "\ufeffa,b"])
def test_a_header_alone_is_no_row(read: Read, content: str):
    assert read("f.csv", content) == []


# Parquet


def read_table(tmp_path: Path, table: pa.Table, **options: Any) -> list[FoundRow]:
    pq.write_table(table, tmp_path / "f.parquet", **options)
    return list(read_rows(tmp_path / "f.parquet", "f.parquet"))


def test_parquet_rows_are_numbered_over_row_groups(tmp_path: Path):
    texts = [f"text {number}" for number in range(2000)]
    rows = read_table(tmp_path, pa.table({"text": texts}), row_group_size=700)
    assert rows == [(f"f.parquet row {number}", {"text": text}) for number, text in enumerate(texts, 1)]


def test_parquet_types_that_hold_text_are_text(tmp_path: Path):
    texts = pa.array(["a", None, "é"])
    for column in (texts.cast(pa.large_string()), texts.dictionary_encode(), texts.cast(pa.string_view())):
        rows = read_table(tmp_path, pa.table({"text": column}))
        assert [found for _, found in rows] == [{"text": "a"}, {"text": None}, {"text": "é"}], column.type


def test_parquet_messages_are_lists_of_objects(tmp_path: Path):
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], []]
    assert [found for _, found in read_table(tmp_path, pa.table({"messages": messages}))] == [
        {"messages": turns} for turns in messages
    ]


def test_a_parquet_value_that_python_can_t_hold_costs_its_row_only(tmp_path: Path):
    days = pa.array([0, 2**60], pa.timestamp("ms"))
    rows = read_table(tmp_path, pa.table({"text": ["a", "b"], "day": days}))
    assert isinstance(rows[0][1], dict)
    assert rows[1] == ("f.parquet row 2", "has a value that can't be read in the column day")


def test_a_parquet_column_of_another_s_name_is_refused(tmp_path: Path):
    table = pa.table([["q"], ["a"], ["b"]], names=["instruction", "output", "output"])
    with pytest.raises(DataError, match=r"^f\.parquet names the column 'output' twice\."):
        read_table(tmp_path, table)


def test_broken_parquet_is_named(tmp_path: Path, read: Read):
    assert error_of(read, "f.parquet", b"PAR1 and no more").startswith("f.parquet is no readable Parquet file:")
    read_table(tmp_path, pa.table({"text": ["x" * 100] * 100}))
    content = (tmp_path / "f.parquet").read_bytes()
    assert error_of(read, "f.parquet", content[: len(content) // 2]).startswith("f.parquet ")


# The file itself


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.parquet"])
def test_a_file_that_can_t_be_read_is_named(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"^{name} can't be read: ") as caught:
        list(read_rows(tmp_path / name, name))
    assert caught.value.fix
