"""The report's own figures, and a sample as text with its loss mask."""

import itertools
import json

import numpy as np
import pytest

from dsft.core.data.report import MAX_PLACES, DataReport, LengthSummary, SamplePreview, preview_sample
from dsft.core.data.rows import BadRow
from dsft.core.data.samples import Sample
from tests.unit.core.data.small_tokenizer import BOS, EOS, make_prefixing


def make_report() -> DataReport:
    return DataReport("data.jsonl", "instruction", ["instruction", "output"], "instruction")


def preview(tokenizer, *parts: tuple[str, bool], row: int = 0) -> SamplePreview:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
    is_target = np.repeat([is_target for _, is_target in parts], [len(part) for part in ids])
    return preview_sample(Sample(np.array(sum(ids, []), dtype=np.int64), is_target, row), tokenizer)


def text_of(found: SamplePreview, is_target: bool) -> str:
    return "".join(text for text, is_learned in found.pieces if is_learned == is_target)


# The report


def test_bad_rows_are_counted_by_reason_and_the_first_places_are_kept():
    report = make_report()
    for number in range(8):
        report.count_bad_row(BadRow(number, f"data.jsonl:{number + 1}", "the response is empty"))
        if number % 4 == 0:
            report.count_bad_row(BadRow(number, f"data.jsonl:{number + 1}", "output is null, not text"))
    empty, null = report.bad_rows
    assert (empty.reason, empty.count) == ("the response is empty", 8)
    assert empty.places == [f"data.jsonl:{number}" for number in range(1, MAX_PLACES + 1)]
    assert (null.count, null.places) == (2, ["data.jsonl:1", "data.jsonl:5"])
    assert report.num_bad_rows == 10


def test_reports_do_not_share_their_lists():
    make_report().count_bad_row(BadRow(0, "a:1", "x"))
    assert make_report().num_bad_rows == 0


def test_lengths_are_those_of_samples_that_exist():
    assert LengthSummary.of(np.arange(1, 101)) == LengthSummary(mean=50.5, median=50, p90=90, p99=99, longest=100)
    assert LengthSummary.of(np.array([7])) == LengthSummary(7.0, 7, 7, 7, 7)
    assert LengthSummary.of(np.array([10, 1000])).median in {10, 1000}


def test_a_report_outlives_the_cache():
    report = make_report()
    report.count_bad_row(BadRow(0, "data.jsonl:1", "the response is empty"))
    report.lengths = LengthSummary.of(np.arange(1, 11))
    report.num_truncated, report.files_left_out = 3, {"not text": 2}
    stored = json.loads(json.dumps(report.as_dict()))
    assert DataReport.from_dict(stored) == report
    assert DataReport.from_dict(json.loads(json.dumps(make_report().as_dict()))) == make_report()


def test_values_of_another_version_are_no_report():
    with pytest.raises(TypeError):
        DataReport.from_dict(make_report().as_dict() | {"num_unheard_of": 1})


# The sample


def test_the_preview_shows_the_loss_mask(small):
    prompt = f"{BOS}### Instruction:\nSort.\n\n### Response:\n"
    found = preview(small, (prompt, False), (f"sorted(x){EOS}", True), row=17)
    assert text_of(found, False) == prompt
    assert text_of(found, True) == f"sorted(x){EOS}"
    assert found.pieces[0] == (BOS, False) and found.pieces[-1] == (EOS, True)
    num_answer = len(small("sorted(x)", add_special_tokens=False)["input_ids"]) + 1
    assert (found.num_target_tokens, found.row) == (num_answer, 17)
    assert found.num_tokens == len(found.pieces), "a piece is a token"


def test_masks_change_more_than_once_in_a_conversation(small):
    parts = [("a?", False), (f"one{EOS}", True), ("\nb?", False), (f"two{EOS}", True)]
    found = preview(small, *parts)
    runs = itertools.groupby(found.pieces, key=lambda piece: piece[1])
    assert [("".join(text for text, _ in run), is_target) for is_target, run in runs] == parts


def test_characters_of_several_tokens_are_one_piece(small):
    found = preview(small, ("naïve ", False), ("你\U0001f600", True))
    assert [text for text, _ in found.pieces][-2:] == ["你", "\U0001f600"]
    assert text_of(found, False) == "naïve "
    assert found.num_tokens > len(found.pieces) and found.num_target_tokens > 2


def test_a_character_that_is_cut_off_is_shown_as_such(small):
    ids = small("a\U0001f600", add_special_tokens=False)["input_ids"][:-1]
    found = preview_sample(Sample(np.array(ids), np.array([False, *[True] * (len(ids) - 1)]), 0), small)
    assert found.pieces == [("a", False), ("\ufffd", True)]


def test_a_sample_that_begins_within_a_character_can_be_shown(small):
    """As a window of a long text may."""
    ids = [small.bos_token_id, *small("\U0001f600ab", add_special_tokens=False)["input_ids"][2:]]
    found = preview_sample(Sample(np.array(ids), np.array([False, *[True] * (len(ids) - 1)]), 0), small)
    assert found.pieces[0] == (BOS, False)
    assert text_of(found, True).endswith("ab") and found.num_tokens == len(ids)


def test_blanks_between_the_pieces_of_a_word_tokenizer_are_kept():
    found = preview(make_prefixing(), ("ab cd", False), ("e f", True))
    # This tokenizer writes a blank before each text that it tokenizes alone.
    assert text_of(found, False) == "ab cd" and text_of(found, True) == " e f"


def test_the_pieces_of_real_sources_are_the_source(deepseek, repository):
    source = (repository / "tests" / "unit" / "core" / "data" / "test_report.py").read_text()
    found = preview(deepseek, (source, True))
    assert text_of(found, True) == source
