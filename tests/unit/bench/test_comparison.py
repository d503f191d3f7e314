"""Ratios to an earlier result, and what is no such result."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from dsft.bench.comparison import compare_results, read_record
from dsft.core.errors import ConfigError, ExitCode
from tests.unit.bench.bench_results import make_result, make_row


def test_ratios_are_new_by_old() -> None:
    old = asdict(make_result(make_row("same", step_s=2.0, reserved=200), make_row("gone")))
    new = make_result(make_row("same", step_s=1.0, reserved=100), make_row("fresh"))
    [ratio] = compare_results(new, json.loads(json.dumps(old)))
    assert ratio.name == "same"
    assert ratio.tok_per_s == 2.0
    assert ratio.step_s == 0.5
    assert ratio.reserved_bytes == 0.5
    assert ratio.device_bytes is None


def test_a_row_that_failed_has_no_ratio() -> None:
    old = asdict(make_result(make_row("same", exit_code=ExitCode.FAILURE)))
    [ratio] = compare_results(make_result(make_row("same")), old)
    assert (ratio.tok_per_s, ratio.step_s) == (None, None)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    written = json.dumps(asdict(make_result(make_row(), make_row("other", exit_code=ExitCode.NO_GPU))))
    path.write_text(written, encoding="utf-8")
    assert read_record(path) == json.loads(written)


def rows(*rows: str) -> str:
    return f'{{"format": 1, "rows": [{", ".join(rows)}]}}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no result of dsft bench"),
        ("{}", "is no result of dsft bench"),
        (rows("3"), "is no result of dsft bench"),
        (rows('{"name": []}'), "is no result of dsft bench"),
        ('{"rows": [], "format": 99}', "has format 99"),
        (rows('{"name": "a"}', '{"name": "b", "speed": 5}'), "speed holds no figures in the row 'b'"),
        (rows('{"name": "a", "speed": {"tok_per_s": "fast"}}'), "speed.tok_per_s is no figure in the row 'a'"),
        (rows('{"name": "a", "speed": {"tok_per_s": true}}'), "speed.tok_per_s is no figure"),
        (rows('{"name": "a", "speed": {"tok_per_s": NaN}}'), "speed.tok_per_s is no figure"),
        (rows('{"name": "a", "speed": {"step_s": 1.0}}'), "speed.step_s holds no figures"),
        (rows('{"name": "a", "speed": {"step_s": {"median": -1}}}'), "speed.step_s.median is no figure"),
        (rows('{"name": "a", "measured": {"reserved_bytes": [1]}}'), "measured.reserved_bytes is no figure"),
        (rows('{"name": "a", "measured": {"device_bytes": 1' + "0" * 400 + "}}"), "measured.device_bytes is no figure"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="--compare: ") as caught:
        read_record(path)
    assert words in caught.value.found


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file or directory"):
        read_record(tmp_path / "none.json")
