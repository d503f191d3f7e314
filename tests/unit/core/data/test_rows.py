"""Rows of Arrow tables, those included that Python can't hold."""

import pyarrow as pa

from dsft.core.data.rows import read_batch

AFTER_9999 = 2**60


def batch(**columns: pa.Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


def test_rows_are_columns_by_name():
    table = pa.table({"text": ["a", None], "turns": [[{"role": "user"}], []]})
    expected = [{"text": "a", "turns": [{"role": "user"}]}, {"text": None, "turns": []}]
    assert list(read_batch(table)) == expected
    assert list(read_batch(table.to_batches()[0])) == expected
    assert list(read_batch(table.slice(0, 0))) == []


def test_a_date_beyond_python_s_costs_its_row_only():
    found = list(read_batch(batch(text=pa.array(["a", "b"]), day=pa.array([AFTER_9999, 0], pa.timestamp("ms")))))
    assert found[0] == "has a value that can't be read in the column day"
    assert isinstance(found[1], dict) and found[1]["text"] == "b"


def test_text_in_another_encoding_costs_its_row_only():
    offsets = pa.py_buffer(b"".join(offset.to_bytes(4, "little") for offset in (0, 1, 2)))
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    found = list(read_batch(batch(number=pa.array([1, 2]), text=broken)))
    assert found == [{"number": 1, "text": "a"}, "has a value that can't be read in the column text"]
