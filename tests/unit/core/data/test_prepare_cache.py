"""What is read from the cache, and what makes samples anew."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dsft.core.data.build import SampleBuilder
from tests.unit.core.data.preparing import ROWS, Prepare, contents, texts, write_lines
from tests.unit.core.data.small_tokenizer import EOS


@pytest.fixture
def num_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data sets that were tokenized."""
    built: list[str] = []
    build = SampleBuilder.build

    def count(self: SampleBuilder, writer: Any) -> dict[str, object]:
        built.append(self._source.name)
        return build(self, writer)

    monkeypatch.setattr(SampleBuilder, "build", count)
    return built


def test_a_second_start_reads_the_cache_and_finds_the_same(prepare: Prepare, num_builds: list[str]):
    write_lines("f.jsonl", ROWS)
    rows_told: list[int] = []
    first, second = prepare(), prepare(on_rows=rows_told.append)
    assert num_builds == ["f.jsonl"]
    assert (first.report.is_from_cache, second.report.is_from_cache) == (False, True)
    assert rows_told == []
    assert contents(second.train) == contents(first.train)
    assert contents(second.validation) == contents(first.validation)
    assert (second.key, second.preview) == (first.key, first.preview)
    first.report.is_from_cache, first.report.seconds = second.report.is_from_cache, second.report.seconds
    assert second.report == first.report


def test_progress_is_told_while_the_samples_are_made(prepare: Prepare):
    write_lines("f.jsonl", ROWS * 50)
    rows_told: list[int] = []
    prepare(on_rows=rows_told.append)
    assert rows_told == sorted(rows_told) and len(rows_told) > 1
    assert rows_told[-1] == 2000


def test_a_moved_file_is_read_from_the_cache_under_its_new_name(prepare: Prepare, num_builds: list[str]):
    write_lines("f.jsonl", ROWS)
    key = prepare().key
    Path("f.jsonl").rename("g.jsonl")
    moved = prepare(dataset="g.jsonl")
    assert (moved.key, moved.report.dataset, num_builds) == (key, "g.jsonl", ["f.jsonl"])


def test_left_out_files_are_those_of_now(prepare: Prepare, num_builds: list[str]):
    Path("src").mkdir()
    Path("src/a.py").write_text("def f(x):\n    return x + 1\n" * 3)
    assert prepare(dataset="src", validation_split=0).report.files_left_out == {}
    Path("src/b.png").write_bytes(b"\0")
    assert prepare(dataset="src", validation_split=0).report.files_left_out == {"binary": 1}
    assert num_builds == ["src"]


CHANGED_SAMPLES: list[dict[str, Any]] = [
    {"max_length": 100},
    {"template": "deepseek"},
    {"loss_on": "all"},
    {"over_length": "truncate"},
    {"max_samples": 30},
    {"bad_rows": "skip"},
    {"fingerprint": "another tokenizer"},
]


@pytest.mark.parametrize("settings", CHANGED_SAMPLES, ids=lambda settings: next(iter(settings)))
def test_what_decides_samples_makes_them_anew(prepare: Prepare, num_builds: list[str], settings: dict[str, Any]):
    write_lines("f.jsonl", ROWS)
    before, after = prepare(), prepare(**settings)
    assert not after.report.is_from_cache
    assert after.key != before.key
    assert prepare().report.is_from_cache, "the other ones are kept"
    assert len(num_builds) == 2


def test_changed_data_is_made_anew(prepare: Prepare, small: PreTrainedTokenizerFast):
    write_lines("f.jsonl", ROWS)
    before = prepare(validation_split=0)
    write_lines("f.jsonl", [*ROWS[:-1], ROWS[-1] | {"output": "It is 0!"}])
    after = prepare(validation_split=0)
    assert not after.report.is_from_cache and after.key != before.key
    assert texts(after.train, small)[-1].endswith(f"It is 0!{EOS}")


def test_a_changed_template_is_made_anew(prepare: Prepare, monkeypatch: pytest.MonkeyPatch):
    from dsft.core.data.prompts import InstructionTemplate

    write_lines("f.jsonl", ROWS)
    before = prepare()
    monkeypatch.setattr(InstructionTemplate, "_ask", lambda self, instruction: f"Q: {instruction}\nA: ")
    after = prepare()
    assert not after.report.is_from_cache and after.key != before.key


@pytest.mark.parametrize("settings", [{"validation_split": 0.5}, {"validation_split": 0}, {"seed": 7}])
def test_what_decides_only_the_division_changes_the_key_alone(
    prepare: Prepare, num_builds: list[str], settings: dict[str, Any]
):
    write_lines("f.jsonl", ROWS)
    before, after = prepare(), prepare(**settings)
    assert after.report.is_from_cache
    assert after.key != before.key
    assert contents(after.train) != contents(before.train)
    assert num_builds == ["f.jsonl"]


def test_the_seed_of_gaps_decides_samples(prepare: Prepare):
    Path("src").mkdir()
    Path("src/a.py").write_text("def f(x):\n    return x + 1\n" * 3)
    before = prepare(dataset="src", validation_split=0)
    after = prepare(dataset="src", validation_split=0, seed=7)
    assert not after.report.is_from_cache
    assert contents(after.train) != contents(before.train)


def test_settings_of_the_training_do_not_change_the_key(prepare: Prepare):
    write_lines("f.jsonl", ROWS)
    settings = {"epochs": 9, "learning_rate": 1e-3, "lora_r": 8, "packing": True, "output_dir": "x", "save_steps": 7}
    before, after = prepare(), prepare(**settings)
    assert after.report.is_from_cache and after.key == before.key


def test_a_damaged_cache_is_made_anew(prepare: Prepare, tmp_path: Path):
    write_lines("f.jsonl", ROWS)
    before = contents(prepare().train)
    (path,) = (tmp_path / "cache").rglob("token_ids")
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    again = prepare()
    assert not again.report.is_from_cache
    assert contents(again.train) == before
