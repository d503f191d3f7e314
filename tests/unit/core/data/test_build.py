"""Building the store of a small hand-made data set: what is counted, and what is refused with its place."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsft.core.data import build
from dsft.core.data.build import SampleBuilder
from dsft.core.data.cache import TokenStore, open_or_build
from dsft.core.data.formats import find_layout
from dsft.core.data.prompts import InstructionTemplate, get_template
from dsft.core.data.report import DataReport
from dsft.core.data.rows import Row
from dsft.core.data.sources import open_source
from dsft.core.data.tokenize import LengthRule, SampleMaker
from dsft.core.errors import DataError
from tests.unit.core.data.small_tokenizer import CHAT_ML, EOS, make_deepseek_like

USABLE = {"instruction": "a", "output": "b"}
EMPTY = {"instruction": "a", "output": " "}
NULL = {"instruction": "a", "output": None}


def write_rows(tmp_path: Path, *rows: dict | str) -> Path:
    path = tmp_path / "f.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def make_store(
    path: Path, template, *, max_length=100, over_length="drop", loss_on="response", max_samples=None, bad_rows="error",
    on_rows=lambda num_rows: None,
) -> tuple[TokenStore, DataReport]:  # fmt: skip
    source = open_source(str(path), split="train", revision=None)
    layout = find_layout(next(row for row in source.rows() if isinstance(row, Row)), source.kind)
    rule = LengthRule(max_length, over_length, loss_on, 0)
    builder = SampleBuilder(source, layout, SampleMaker(template, rule), rule, max_samples, bad_rows, on_rows)
    cache = path.parent / "cache"
    store, is_from_cache = open_or_build(cache, f"key{len(list(cache.glob('*/*')))}", 400, builder.build)
    assert not is_from_cache
    report = DataReport.from_dict(store.report)
    # Counted twice over: in the report, and in what was stored.
    assert report.num_samples == len(store) and report.num_tokens == store.lengths.sum()
    assert report.num_target_tokens == sum(int(store[index].is_target.sum()) for index in range(len(store)))
    assert report.num_used_rows == len({store[index].row for index in range(len(store))})
    return store, report


@pytest.fixture(scope="module")
def instruction(small):
    return get_template("instruction", small)


def test_plain_rows_are_counted(tmp_path, instruction):
    rows = [{"instruction": letter, "output": letter * (index + 1)} for index, letter in enumerate("abc")]
    store, report = make_store(write_rows(tmp_path, *rows), instruction)
    num_prompt = len(instruction.encode_prompt("a"))
    assert store.lengths.tolist() == [num_prompt + 2, num_prompt + 3, num_prompt + 4]
    assert (report.num_rows, report.num_used_rows, report.num_samples) == (3, 3, 3)
    assert (report.num_tokens, report.num_target_tokens) == (3 * num_prompt + 9, 9)
    assert (report.lengths.median, report.lengths.longest) == (num_prompt + 3, num_prompt + 4)
    assert (report.layout, report.template) == ("instruction", "instruction")
    assert report.columns[0] == "instruction" and "output" in report.columns
    untouched = ("bad_rows", "over_length", "no_room", "truncated", "split", "without_end", "without_target")
    assert [getattr(report, f"num_{name}") for name in untouched] == [0] * len(untouched)
    assert report.rows_per_s > 0


def test_the_columns_that_rows_have_are_told_from_those_that_are_not_used(tmp_path, instruction):
    rows = [USABLE | {"id": 7}, EMPTY | {"source": "x"}, USABLE | {"system": "s"}]
    _, report = make_store(write_rows(tmp_path, *rows), instruction, bad_rows="skip")
    assert report.columns == ["instruction", "output", "system"], "no row has an input"
    assert report.unused_columns == ["id", "source"]
    _, report = make_store(write_rows(tmp_path, USABLE, USABLE | {"input": "x"}), instruction)
    assert (report.columns, report.unused_columns) == (["instruction", "input", "output"], [])


def test_the_path_of_a_source_file_is_no_unused_column(tmp_path, small):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    _, report = make_store(tmp_path / "src", get_template("text", small))
    assert (report.columns, report.unused_columns) == (["text"], [])


def test_every_fate_is_counted_once(tmp_path, instruction):
    """Of each kind another number of rows, so that no two counts can be mixed up."""
    num_prompt = len(instruction.encode_prompt("a"))
    rows = [
        *[USABLE] * 4,
        *[{"instruction": "a", "output": "b" * 50}] * 3,
        *[{"instruction": "a" * 60, "output": "b"}] * 2,
        *[EMPTY] * 5,
        NULL,
        "[1]",
    ]
    path = write_rows(tmp_path, *rows)
    store, report = make_store(path, instruction, max_length=num_prompt + 9, over_length="truncate", bad_rows="skip")
    assert (report.num_rows, report.num_used_rows, report.num_samples) == (16, 7, 7)
    assert (report.num_truncated, report.num_no_room, report.num_over_length) == (3, 2, 0)
    assert report.num_bad_rows == 7 and sorted(bad.count for bad in report.bad_rows) == [1, 1, 5]
    assert (report.num_without_end, report.num_without_target, report.num_split) == (0, 0, 0)
    assert report.num_repeated_prompts == 6
    assert store.lengths.tolist() == [num_prompt + 2] * 4 + [num_prompt + 9] * 3
    assert [store[index].row for index in range(7)] == list(range(7))

    _, dropped = make_store(path, instruction, max_length=num_prompt + 9, over_length="drop", bad_rows="skip")
    assert (dropped.num_over_length, dropped.num_truncated, dropped.num_no_room) == (5, 0, 0)
    assert (dropped.num_used_rows, dropped.num_repeated_prompts) == (4, 3)


def test_unusable_rows_are_named_by_reason_and_line(tmp_path, instruction):
    rows = [USABLE, EMPTY, NULL, "[1]", {"instruction": "a"}, USABLE, EMPTY]
    store, report = make_store(write_rows(tmp_path, *rows), instruction, bad_rows="skip")
    places = {bad.reason: [Path(place).name for place in bad.places] for bad in report.bad_rows}
    assert places["the response is empty"] == ["f.jsonl:2", "f.jsonl:7"]
    assert places["output is null, not text"] == ["f.jsonl:3"]
    assert places["output is missing"] == ["f.jsonl:5"]
    assert ["f.jsonl:4"] in places.values(), "a list instead of an object"
    assert report.num_bad_rows == 5
    assert [store[index].row for index in range(2)] == [0, 5]


def test_unusable_rows_end_the_run_with_their_places_and_nothing_is_left(tmp_path, instruction):
    path = write_rows(tmp_path, USABLE, EMPTY, USABLE, NULL, USABLE)
    with pytest.raises(DataError) as raised:
        make_store(path, instruction)
    assert "2 rows of" in raised.value.found
    assert "f.jsonl:2 (the response is empty)" in raised.value.found
    assert "f.jsonl:4 (output is null, not text)" in raised.value.found
    assert "--bad-rows skip" in raised.value.fix
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_of_many_unusable_rows_the_first_are_named_and_all_counted(tmp_path, instruction):
    with pytest.raises(DataError, match=r"^20 rows of .* and 15 more\.") as raised:
        make_store(write_rows(tmp_path, USABLE, *[EMPTY] * 20), instruction)
    assert raised.value.found.count("the response is empty") == 5


def test_rows_that_only_the_template_refuses_are_named_too(tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    template = get_template("chat", make_deepseek_like(refuses + CHAT_ML))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "s"}, *turns]}, {"messages": turns}]
    path = write_rows(tmp_path, *rows)
    with pytest.raises(DataError, match=r"1 row of .*f\.jsonl:2 .*no system text"):
        make_store(path, template)
    store, report = make_store(path, template, bad_rows="skip")
    assert (report.num_rows, report.num_used_rows, report.num_bad_rows) == (3, 2, 1)
    assert [store[0].row, store[1].row] == [0, 2]


# Counted on what is stored


class ForgetfulTemplate(InstructionTemplate):
    """Leaves the end token, or every target, away where it is told to."""

    def render(self, example):
        segments = super().render(example)
        if "endless" in example.turns[0].text:
            return segments[:-1]
        if "aimless" in example.turns[0].text:
            return [segment._replace(is_target=False) for segment in segments]
        return segments


def test_lost_end_tokens_and_samples_without_target_are_seen_in_the_tokens(tmp_path, small):
    questions = ["fine", "endless 1", "endless 2", "aimless 1", "aimless 2", "aimless 3"]
    path = write_rows(tmp_path, *({"instruction": question, "output": "b"} for question in questions))
    _, report = make_store(path, ForgetfulTemplate(small))
    assert report.num_without_target == 3
    assert report.num_without_end == 5, "an end token that is not learned does not teach to stop"


def test_data_without_any_loss_is_refused(tmp_path, small):
    path = write_rows(tmp_path, {"instruction": "aimless", "output": "b"})
    with pytest.raises(DataError, match="nothing would be learned"):
        make_store(path, ForgetfulTemplate(small))


# Texts


def test_texts_that_become_several_samples_are_counted_as_rows_and_as_samples(tmp_path, small):
    path = write_rows(tmp_path, {"text": "0123456789" * 5}, {"text": "x"}, {"text": "0123456789" * 3})
    store, report = make_store(path, get_template("text", small), max_length=20)
    assert [store[index].row for index in range(len(store))] == [0, 0, 0, 1, 2, 2]
    assert (report.num_used_rows, report.num_samples, report.num_split) == (3, 6, 2)
    assert (report.num_without_end, report.num_repeated_prompts) == (0, 0)


def test_source_files_are_rows_and_windows_without_a_gap_are_counted(tmp_path, small):
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "a.py").write_text("print(x)\n" * 9 + " " * 2900 + "x\n")
    (folder / "b.py").write_text("print(y)\n" * 90)
    store, report = make_store(folder, get_template("fim", small), max_length=2908)
    assert (report.layout, report.template) == ("source files", "fim")
    assert (report.num_rows, report.num_used_rows, report.num_split, report.num_left_out_windows) == (2, 2, 0, 1)
    assert [store[index].row for index in range(len(store))] == [0, 1]


def test_sources_without_any_gap_are_refused_for_that_reason(tmp_path, small):
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "a.py").write_text(" " * 2900 + "x\n")
    with pytest.raises(DataError, match=r"No row of .* no gap with text in it fits"):
        make_store(folder, get_template("fim", small), max_length=3000)


# Nothing usable


def test_when_all_rows_are_too_long_the_error_says_how_long(tmp_path, instruction):
    path = write_rows(tmp_path, *({"instruction": "a", "output": "b" * (50 + n)} for n in (0, 1, 9)))
    median = len(instruction.encode_prompt("a")) + 52
    with pytest.raises(DataError, match=rf"All 3 rows of .* longer than the 40 .*median: {median} tokens") as raised:
        make_store(path, instruction, max_length=40)
    assert f"--max-length {median}" in raised.value.fix and "--over-length truncate" in raised.value.fix
    with pytest.raises(DataError, match="none has room for its response") as raised:
        make_store(path, instruction, max_length=10, over_length="truncate")
    assert f"--max-length {median}" in raised.value.fix


def test_when_all_rows_are_unusable_the_error_says_why(tmp_path, instruction):
    with pytest.raises(DataError, match=r"No row of .* can be used: .*f\.jsonl:1 \(the response is empty\)"):
        make_store(write_rows(tmp_path, EMPTY, EMPTY), instruction, bad_rows="skip")


# How far is read


def test_max_samples_counts_usable_rows_and_reads_no_further(tmp_path, instruction):
    too_long = {"instruction": "a", "output": "b" * 100}
    path = write_rows(tmp_path, USABLE, EMPTY, too_long, USABLE, too_long, USABLE, NULL, USABLE)
    store, report = make_store(path, instruction, max_samples=3, bad_rows="skip")
    assert [store[index].row for index in range(len(store))] == [0, 3, 5]
    assert (report.num_rows, report.num_used_rows, report.num_over_length, report.num_bad_rows) == (6, 3, 2, 1)


def test_an_unusable_row_behind_the_last_one_used_does_no_harm(tmp_path, instruction):
    store, report = make_store(write_rows(tmp_path, USABLE, USABLE, EMPTY), instruction, max_samples=2)
    assert len(store) == 2 and report.num_bad_rows == 0


def test_fewer_rows_than_max_samples_are_all_used(tmp_path, instruction):
    store, _ = make_store(write_rows(tmp_path, USABLE, USABLE), instruction, max_samples=500)
    assert len(store) == 2


@pytest.mark.parametrize(("name", "value"), [("BATCH_ROWS", 3), ("BATCH_CHARACTERS", 20)])
def test_batches_change_neither_samples_nor_their_order(tmp_path, instruction, monkeypatch, name, value):
    rows = [{"instruction": f"a{n % 7}", "output": "b" * (n * 37 % 61) or "c"} for n in range(40)]
    path = write_rows(tmp_path, *rows)
    one, one_report = make_store(path, instruction)
    monkeypatch.setattr(build, name, value)
    seen: list[int] = []
    several, several_report = make_store(path, instruction, on_rows=seen.append)
    assert several.lengths.tolist() == one.lengths.tolist()
    for index in range(len(one)):
        assert several[index].row == one[index].row
        assert np.array_equal(several[index].token_ids, one[index].token_ids)
        assert np.array_equal(several[index].is_target, one[index].is_target)
    one_report.rows_per_s = several_report.rows_per_s = 0.0
    assert several_report == one_report and one_report.num_repeated_prompts == 33
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == 40


def test_the_stored_tokens_are_those_of_the_rows(tmp_path, instruction):
    rows = [
        {"instruction": "Fix it.", "input": "x = 1", "output": "é"},
        {"instruction": "b", "input": "", "output": "c"},
    ]
    store, _ = make_store(write_rows(tmp_path, *rows), instruction)
    decoded = [instruction.encoder.decode(store[index].token_ids.tolist()) for index in range(2)]
    assert [text.partition("### ")[2] for text in decoded] == [
        f"Instruction:\nFix it.\n\nx = 1\n\n### Response:\né{EOS}",
        f"Instruction:\nb\n\n### Response:\nc{EOS}",
    ]
