"""An answer as it grows: what ends it, and what is passed on of it."""

import pytest

from dsft.infer.answer import Answer, StopReason
from tests.scripted_models import EOS, make_tokenizer

LIMIT: StopReason = "max_new_tokens"


def push_all(answer: Answer, text: str) -> int:
    """Push the tokens of a text, one for each byte, up to the one that ends the answer; return how many that were."""
    token_ids = make_tokenizer()(text)["input_ids"]
    for count, token_id in enumerate(token_ids, 1):
        if answer.push(token_id):
            return count
    return len(token_ids)


@pytest.mark.parametrize("enough", [True, False, None])
def test_who_receives_the_text_ends_it_by_true_alone(enough: bool | None) -> None:
    pieces: list[str] = []

    def take(text: str) -> bool | None:
        pieces.append(text)
        return enough if text == "c" else None

    answer = Answer(make_tokenizer(), [], [], [], LIMIT, take)
    assert push_all(answer, "abcde") == (3 if enough else 5)
    answer.finish()
    assert answer.text == "".join(pieces) == ("abc" if enough else "abcde")
    assert answer.stop_reason == ("code_complete" if enough else LIMIT)


def test_nothing_that_is_held_back_follows_complete_code() -> None:
    answer = Answer(make_tokenizer(), [], ["cdx"], [], LIMIT, lambda text: "b" in text)
    assert push_all(answer, "abcd") == 2
    answer = Answer(make_tokenizer(), [], ["bx"], [], LIMIT, lambda text: "b" in text)
    assert push_all(answer, "abcd") == 3  # b may be the beginning of the stop text
    answer.finish()
    assert (answer.text, answer.stop_reason) == ("abc", "code_complete")


def test_an_end_token_that_came_before_stays_the_reason() -> None:
    tokenizer = make_tokenizer()
    answer = Answer(tokenizer, [tokenizer.eos_token_id], ["bx"], [], LIMIT, lambda text: "b" in text)
    assert push_all(answer, f"ab{EOS}") == 3
    answer.finish()
    assert (answer.text, answer.stop_reason) == ("ab", "end_token")
