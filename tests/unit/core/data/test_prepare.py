"""The whole way of a run's data: every kind of file, division, refusals."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from dsft.core.errors import UnreachableHubError
from tests.unit.core.data.preparing import ROWS, Prepare, contents, error_of, texts, write_lines
from tests.unit.core.data.small_tokenizer import EOS

# Kinds of files and layouts


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], object]] = {
    "f.jsonl": write_lines,
    "f.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "f.csv": write_csv,
    "f.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


def test_the_same_rows_give_the_same_samples_from_any_kind_of_file(prepare: Prepare, small: PreTrainedTokenizerFast):
    rows = [row | {"output": f'{row["output"]}\n"ü", \U0001f600'} for row in ROWS]
    found = []
    for name, write in WRITERS.items():
        write(Path(name), rows)
        data = prepare(dataset=name)
        found.append((contents(data.train), contents(data.validation)))
        assert (data.report.num_rows, data.report.num_used_rows, data.report.layout) == (40, 40, "instruction")
    assert all(samples == found[0] for samples in found)
    assert prepare(dataset=name, validation_split=0).train[3].row == 3
    text = texts(prepare(dataset=name, validation_split=0).train, small)[3]
    assert text.endswith(f'### Response:\nIt is 3.\n"ü", \U0001f600{EOS}')


def test_only_the_response_and_its_end_carry_loss(prepare: Prepare, small: PreTrainedTokenizerFast):
    write_lines("f.jsonl", ROWS)
    data = prepare(validation_split=0)
    token_ids, is_target = contents(data.train)[0]
    targets = [token_id for token_id, carries in zip(token_ids, is_target, strict=True) if carries]
    assert small.decode(targets) == f"It is 0.{EOS}"
    assert data.report.num_target_tokens == sum(sum(m) for _, m in contents(data.train))
    assert "".join(text for text, carries in data.preview.pieces if carries) == f"It is 0.{EOS}"
    assert data.preview.num_target_tokens == len(targets)


@pytest.mark.parametrize(
    ("row", "layout", "template"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt/completion", "instruction"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "messages",
            "instruction",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "conversations",
            "instruction",
        ),
        ({"text": "a"}, "text", "text"),
        ({"prefix": "p", "suffix": "s", "middle": "a"}, "fim", "fim"),
    ],
)
def test_each_layout_has_its_template(
    prepare: Prepare, small: PreTrainedTokenizerFast, row: dict[str, Any], layout: str, template: str
):
    write_lines("f.jsonl", [row])
    data = prepare(validation_split=0)
    assert (data.report.layout, data.report.template, data.template.name) == (layout, template, template)
    ((token_ids, is_target),) = contents(data.train)
    assert small.decode(np.array(token_ids)[is_target].tolist()) == f"a{EOS}"


def test_a_folder_of_source_files_gives_gaps_to_fill(prepare: Prepare):
    Path("src").mkdir()
    Path("src/a.py").write_text("def f(x):\n    return x + 1\n" * 3)
    Path("src/picture.png").write_bytes(b"\0")
    data = prepare(dataset="src", validation_split=0)
    assert (data.report.layout, data.template.name) == ("source files", "fim")
    assert data.report.files_left_out == {"binary": 1}


# Division


def test_a_share_is_held_out_by_prompt(prepare: Prepare, small: PreTrainedTokenizerFast):
    write_lines("f.jsonl", [*ROWS, *(row | {"output": "Another answer."} for row in ROWS)])
    data = prepare()
    assert (data.report.num_train_samples, data.report.num_validation_samples) == (60, 20)
    assert (len(data.train), len(data.validation or [])) == (60, 20)
    trained, held_out = (
        {text.partition("### Response")[0] for text in texts(samples, small)}
        for samples in (data.train, data.validation)
    )
    assert len(trained) == 30 and len(held_out) == 10 and not trained & held_out
    assert data.report.num_repeated_prompts == 40
    assert contents(prepare().validation) == contents(data.validation)


def test_windows_of_one_text_stay_together(prepare: Prepare):
    write_lines("f.jsonl", [{"text": f"{number} " * 300} for number in range(8)])
    data = prepare(max_length=100)
    assert data.report.num_split == 8
    rows = [{samples[i].row for i in range(len(samples))} for samples in (data.train, data.validation) if samples]
    assert [len(of_one) for of_one in rows] == [6, 2] and not rows[0] & rows[1]


def test_nothing_is_held_out_on_demand(prepare: Prepare):
    write_lines("f.jsonl", ROWS)
    data = prepare(validation_split=0)
    assert data.validation is None
    assert (data.report.num_train_samples, data.report.num_validation_samples, data.report.remarks) == (40, 0, [])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (ROWS[:1] * 10, "all are of the same prompt or text"),
        (
            ROWS[:2] * 10,
            "those of the same prompt or text stay together, and each such group is larger than --validation-split 0.1",
        ),
    ],
)
def test_prompts_of_which_none_can_be_held_out_are_remarked_on(prepare: Prepare, rows: list[Any], reason: str):
    write_lines("f.jsonl", rows)
    data = prepare(validation_split=0.1)
    assert data.validation is None and len(data.train) == len(rows)
    assert data.report.remarks == [f"No samples are held out for validation: {reason}."]
    error = error_of(prepare, validation_split=0.1, keep="best")
    assert error.found == data.report.remarks[0] and "--validation-dataset" in error.fix


def test_a_validation_data_set_is_used_whole(prepare: Prepare, small: PreTrainedTokenizerFast):
    write_lines("f.jsonl", ROWS)
    held_out = [{"prompt": f"Spell {number}.", "completion": "No."} for number in range(7)]
    write_lines(
        "v.jsonl", [*held_out, {"prompt": "Say 3.", "completion": "a"}, {"prompt": "Say 3.", "completion": "b"}]
    )
    data = prepare(validation_dataset="v.jsonl", max_samples=5)
    assert (data.report.num_train_samples, data.report.num_validation_samples) == (5, 9)
    assert texts(data.validation, small)[0].endswith(f"Spell 0.\n\n### Response:\nNo.{EOS}")
    assert data.report.num_shared_prompts == 1
    assert data.report.remarks == ["1 prompt of the validation data is also trained on."]
    assert data.report.validation is not None
    assert (data.report.validation.dataset, data.report.validation.num_rows) == ("v.jsonl", 9)


def test_validation_data_without_shared_prompts_are_not_remarked_on(prepare: Prepare):
    write_lines("f.jsonl", ROWS)
    write_lines("v.jsonl", [ROWS[0] | {"instruction": "Something else."}])
    report = prepare(validation_dataset="v.jsonl").report
    assert (report.num_shared_prompts, report.remarks) == (0, [])


def test_a_changed_validation_data_set_changes_the_key(prepare: Prepare):
    write_lines("f.jsonl", ROWS)
    write_lines("v.jsonl", ROWS[:3])
    before = prepare(validation_dataset="v.jsonl")
    write_lines("v.jsonl", ROWS[:4])
    after = prepare(validation_dataset="v.jsonl")
    assert after.key != before.key and after.report.is_from_cache
    assert after.report.validation is not None and not after.report.validation.is_from_cache


def test_a_folder_s_test_split_serves_for_validation(prepare: Prepare):
    Path("d").mkdir()
    write_lines("d/train.jsonl", ROWS)
    write_lines("d/test.jsonl", ROWS[:3])
    data = prepare(dataset="d", validation_dataset="d")
    assert (data.report.num_train_samples, data.report.num_validation_samples) == (40, 3)
    assert data.report.num_shared_prompts == 3
    assert data.report.remarks == ["3 prompts of the validation data are also trained on."]


def test_validation_data_that_the_template_can_t_write_are_refused(prepare: Prepare):
    write_lines("f.jsonl", ROWS)
    write_lines("v.jsonl", [{"text": "a"}])
    assert "instruction has no place for" in error_of(prepare, validation_dataset="v.jsonl").found


# Rows that can't be used


def with_bad_rows() -> list[Any]:
    rows: list[Any] = list(ROWS)
    rows[6] = ROWS[6] | {"output": ""}
    rows[11] = {"instruction": "Say 11."}
    rows[12] = 17
    rows[20] = ROWS[20] | {"output": " "}
    return rows


def test_bad_rows_refuse_the_run_and_leave_nothing(prepare: Prepare, tmp_path: Path):
    write_lines("f.jsonl", with_bad_rows())
    error = error_of(prepare)
    assert error.found == (
        "4 rows of f.jsonl can't be used: f.jsonl:7 (the response is empty), f.jsonl:12 (output is missing), "
        "f.jsonl:13 (is no JSON object), f.jsonl:21 (the response is empty)."
    )
    assert "--bad-rows skip" in error.fix
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_bad_rows_are_left_out_and_counted_on_demand(prepare: Prepare, small: PreTrainedTokenizerFast):
    write_lines("f.jsonl", with_bad_rows())
    for report in (prepare(bad_rows="skip").report, prepare(bad_rows="skip").report):
        assert (report.num_rows, report.num_used_rows, report.num_bad_rows) == (40, 36, 4)
        assert [(bad.reason, bad.count, bad.places) for bad in report.bad_rows] == [
            ("the response is empty", 2, ["f.jsonl:7", "f.jsonl:21"]),
            ("output is missing", 1, ["f.jsonl:12"]),
            ("is no JSON object", 1, ["f.jsonl:13"]),
        ]
    data = prepare(bad_rows="skip", validation_split=0)
    good = [number for number in range(40) if number not in {6, 11, 12, 20}]
    assert [data.train[index].row for index in range(len(data.train))] == good
    assert f"Say {good[6]}." in texts(data.train, small)[6]


def test_many_bad_rows_are_counted_and_the_first_named(prepare: Prepare):
    write_lines("f.jsonl", [*ROWS, *[{"instruction": "a", "output": ""}] * 2000])
    found = error_of(prepare).found
    assert found.startswith("2000 rows of f.jsonl can't be used: f.jsonl:41 (the response is empty)")
    assert found.endswith("f.jsonl:45 (the response is empty) and 1995 more.")


def test_a_bad_first_row_is_skipped_for_the_layout(prepare: Prepare):
    write_lines("f.jsonl", [17, *ROWS])
    assert "f.jsonl:1 (is no JSON object)" in error_of(prepare).found
    assert prepare(bad_rows="skip").report.num_used_rows == 40


def test_bad_validation_rows_are_refused_alike(prepare: Prepare):
    write_lines("f.jsonl", ROWS)
    write_lines("v.jsonl", with_bad_rows())
    assert "v.jsonl:7" in error_of(prepare, validation_dataset="v.jsonl").found
    report = prepare(validation_dataset="v.jsonl", bad_rows="skip").report
    assert report.validation is not None and report.validation.num_bad_rows == 4


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("17\n18\n", "No row of f.jsonl can be used: f.jsonl:1 is no JSON object."),
        ("\n\n", "f.jsonl holds no rows."),
        ("", "f.jsonl is empty."),
        ('{"instruction": "a", "outptu": "b"}\n', "f.jsonl:1 has the columns instruction, outptu"),
        ("\n" * 6 + "{]\n", "f.jsonl:7 is broken JSON"),
        (f"{json.dumps(ROWS[0])}\n" * 6 + "{]\n", "f.jsonl:7 is broken JSON"),
    ],
)
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_data_that_can_t_be_used_at_all(prepare: Prepare, tmp_path: Path, bad_rows: str, content: str, found: str):
    Path("f.jsonl").write_text(content)
    assert error_of(prepare, bad_rows=bad_rows).found.startswith(found)
    assert not list((tmp_path / "cache").rglob("*.partial")) and not list((tmp_path / "cache").rglob("index"))


def test_rows_that_are_all_bad_are_no_data(prepare: Prepare):
    write_lines("f.jsonl", [{"instruction": "a", "output": ""}] * 2)
    assert (
        "No row of f.jsonl can be used: f.jsonl:1 (the response is empty)" in error_of(prepare, bad_rows="skip").found
    )


def test_rows_that_are_all_too_long_say_which_length_would_do(prepare: Prepare):
    write_lines("f.jsonl", ROWS)
    error = error_of(prepare, max_length=8)
    assert error.found.startswith("All 40 rows of f.jsonl are longer than the 8 tokens of --max-length (median: ")
    length = int(error.found.partition("median: ")[2].split()[0])
    assert f"--max-length {length}" in error.fix
    assert prepare(max_length=length).report.num_used_rows >= 20


def test_a_single_row_that_is_too_long_is_no_plural(prepare: Prepare):
    write_lines("f.jsonl", ROWS[:1])
    assert error_of(prepare, max_length=8).found.startswith("The one row of f.jsonl is longer than the 8 tokens of")


def test_missing_data_are_named(prepare: Prepare):
    assert "There is no data file nothing.jsonl" in error_of(prepare, dataset="nothing.jsonl").found
    write_lines("f.jsonl", ROWS)
    assert "There is no data file v.csv" in error_of(prepare, validation_dataset="v.csv").found


def test_a_hub_data_set_out_of_reach_names_the_ways_on(prepare: Prepare):
    with pytest.raises(UnreachableHubError) as caught:
        prepare(dataset="owner/name")
    assert "--dataset FILE" in caught.value.fix and "--preset tiny" in caught.value.fix


# Only so many


@pytest.mark.parametrize("num_samples", [1, 7, 40, 1000, 1537])
def test_the_first_usable_rows_are_taken(prepare: Prepare, num_samples: int):
    rows = [row if number % 3 else row | {"output": ""} for number, row in enumerate(ROWS * 50)]
    write_lines("f.jsonl", rows)
    data = prepare(max_samples=num_samples, bad_rows="skip", validation_split=0)
    expected = [number for number in range(len(rows)) if number % 3][:num_samples]
    assert [data.train[index].row for index in range(len(data.train))] == expected
    if num_samples < len(expected):
        assert data.report.num_rows == expected[-1] + 1, "no row behind the last one is read"


def test_rows_that_are_too_long_do_not_count_as_taken(prepare: Prepare):
    long = {"instruction": "a", "output": "b " * 500}
    write_lines("f.jsonl", [long, *ROWS[:5], long, long, *ROWS[5:10]])
    data = prepare(max_samples=8, validation_split=0)
    assert [data.train[index].row for index in range(len(data.train))] == [1, 2, 3, 4, 5, 8, 9, 10]
    assert data.report.num_over_length == 3


def test_bad_rows_behind_those_taken_do_not_matter(prepare: Prepare):
    write_lines("f.jsonl", [*ROWS[:5], {"instruction": "a"}])
    assert prepare(max_samples=5, validation_split=0).report.num_used_rows == 5
    assert "f.jsonl:6" in error_of(prepare, max_samples=6).found
