"""Drafts by prompt lookup: always what a search through the whole text finds."""

import random

import pytest

from dsft.infer.decoding.draft import MAX_DRAFT_TOKENS, PromptLookup


def search(text: list[int], max_tokens: int) -> list[int]:
    """What followed the last earlier place of the longest ending of 4, 3 or 2 tokens, copied token by token."""
    for length in (4, 3, 2):
        ending = text[-length:]
        places = [at for at in range(len(text) - length) if text[at : at + length] == ending]
        if len(ending) == length and places:
            source = places[-1] + length
            longer = list(text)
            for offset in range(max(0, min(max_tokens, MAX_DRAFT_TOKENS))):
                longer.append(longer[source + offset])  # reads on in what it has copied
            return longer[len(text) :]
    return []


@pytest.mark.parametrize("num_symbols", [1, 2, 3, 8])
@pytest.mark.parametrize("num_given", [0, 1, 5, 60])
def test_drafts_are_what_a_search_through_the_text_finds(num_symbols: int, num_given: int) -> None:
    generator = random.Random(num_symbols * 100 + num_given)
    num_found = 0
    for _ in range(20):
        text = [generator.randrange(num_symbols) for _ in range(num_given)]
        lookup = PromptLookup(text)
        for _ in range(40):
            limit = generator.randrange(-1, MAX_DRAFT_TOKENS + 4)
            draft = lookup.find(limit)
            assert draft == search(text, limit), (text, limit)
            num_found += bool(draft)
            token_id = generator.randrange(num_symbols)
            lookup.append(token_id)
            text.append(token_id)
    assert num_found > 100  # there was something to compare


def test_a_longer_ending_counts_before_a_later_place() -> None:
    text = [1, 2, 3, 70, 9, 2, 3, 71, 1, 2, 3]
    assert PromptLookup(text).find(1) == [70]
    assert PromptLookup(text[1:]).find(1) == [71]


def test_of_equal_endings_the_last_place_counts() -> None:
    assert PromptLookup([5, 6, 70, 5, 6, 71, 5, 6]).find(1) == [71]


def test_a_single_token_that_stood_before_gives_no_draft() -> None:
    assert PromptLookup([5, 6, 7, 5]).find(5) == []


@pytest.mark.parametrize("period", [1, 2, 3, 5, 7, 9])
def test_a_text_that_repeats_itself_is_gone_on_with_beyond_its_end(period: int) -> None:
    cycle = list(range(10, 10 + period))
    assert PromptLookup([1, 2, 3, *cycle * 3]).find(99) == (cycle * MAX_DRAFT_TOKENS)[:MAX_DRAFT_TOKENS]


@pytest.mark.parametrize("limit", [-1, 0])
def test_no_room_no_draft(limit: int) -> None:
    assert PromptLookup([1, 2, 1, 2, 1, 2]).find(limit) == []


def test_drafts_are_no_longer_than_a_pass_takes() -> None:
    assert len(PromptLookup([1, 2] * 50).find(1000)) == MAX_DRAFT_TOKENS
