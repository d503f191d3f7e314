import pytest

from dsft.core.data.examples import Conversation, FimTriple, RawText, Turn, UnusableRowError, hash_text, prompt_of
from tests.unit.core.data.conversations import converse


def test_the_answer_is_no_part_of_the_prompt():
    assert prompt_of(converse("Sort.", "a")) == prompt_of(converse("Sort.", "b"))
    assert prompt_of(FimTriple("a", "c", "b")) == prompt_of(FimTriple("a", "c", "x"))


@pytest.mark.parametrize(
    "other",
    [
        converse("Sort!", "a"),
        converse("Sort.", "a", system="Be brief."),
        Conversation((Turn("user", "Sort."), Turn("assistant", "?"), Turn("user", "b"), Turn("assistant", "a", True))),
    ],
    ids=["another question", "a system text", "an answer that is given"],
)
def test_whatever_the_model_reads_before_it_answers_is_the_prompt(other):
    assert prompt_of(other) != prompt_of(converse("Sort.", "a"))


def test_a_prompt_ends_at_the_first_answer_to_learn():
    """Else the same dialogue at two lengths could be trained on and validated with."""
    assert prompt_of(converse("Sort.", "a", "Faster.", "b")) == prompt_of(converse("Sort.", "c"))


def test_prefix_and_suffix_do_not_run_into_each_other():
    assert prompt_of(FimTriple("ab", "c", "x")) != prompt_of(FimTriple("a", "bc", "x"))


def test_a_text_is_its_own_prompt():
    assert prompt_of(RawText("a", parse_special=True)) == prompt_of(RawText("a", parse_special=False)) == "a"


def test_hashes_are_the_same_on_every_machine_and_fit_64_bits():
    assert hash_text("naïve") == 0xDC4CEBEE9268F2BE, "what `b2sum -l 64` prints, the lowest byte first"
    assert len({hash_text(f"{number}é") for number in range(1000)}) == 1000


def test_a_reason_is_what_the_error_says():
    error = UnusableRowError("the response is empty")
    assert error.reason == str(error) == "the response is empty"
