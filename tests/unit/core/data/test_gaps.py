"""Gaps drawn into source texts: the same for the same seed, nothing of the text changed or lost, all samples fit."""

import pytest

from dsft.core.data.gaps import GapDrawer
from dsft.core.data.prompts import get_template

SOURCE = "".join(f"def f{number}(x):\n    # naïve \U0001f600\n    return x + {number}\n\n" for number in range(40))


def draw(tokenizer, text: str, max_length: int = 120, seed: int = 0):
    return GapDrawer(get_template("fim", tokenizer), max_length, seed).draw_samples(text)


def ids_of(samples) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]


def rejoin(tokenizer, token_ids: list[int]) -> str:
    """Return the text that a sample was made of; nothing but its three parts may be in it."""
    begin, hole, end = tokenizer.convert_tokens_to_ids(["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"])
    assert token_ids[:2] == [tokenizer.bos_token_id, begin] and token_ids[-1] == tokenizer.eos_token_id
    at_hole, at_end = token_ids.index(hole), token_ids.index(end)
    parts = (token_ids[2:at_hole], token_ids[at_end + 1 : -1], token_ids[at_hole + 1 : at_end])
    return "".join(map(tokenizer.decode, parts))


@pytest.mark.parametrize("max_length", [40, 120, 5000])
def test_the_samples_of_a_text_rejoin_to_it(small, max_length):
    samples, windows = draw(small, SOURCE, max_length)
    assert "".join(rejoin(small, ids) for ids in ids_of(samples)) == SOURCE
    assert windows == {"used": len(samples), "left out": 0}
    assert max(len(sample.token_ids) for sample in samples) <= max_length


def test_real_sources_rejoin_with_the_real_tokenizer(deepseek, repository):
    source = (repository / "dsft" / "core" / "data" / "gaps.py").read_text()
    samples, windows = draw(deepseek, source, 256)
    assert len(samples) > 1 and windows["left out"] == 0
    assert "".join(rejoin(deepseek, ids) for ids in ids_of(samples)) == source


def test_only_the_middle_and_its_end_are_learned(small):
    samples, _ = draw(small, SOURCE)
    end = small.convert_tokens_to_ids("<｜fim▁end｜>")
    for sample in samples:
        first = sample.token_ids.tolist().index(end) + 1
        assert sample.is_target.tolist() == [False] * first + [True] * (len(sample.token_ids) - first)
        assert len(sample.token_ids) - first > 1


def test_gaps_follow_from_text_and_seed_alone(small):
    drawer = GapDrawer(get_template("fim", small), 120, 7)
    first, _ = drawer.draw_samples(SOURCE)
    drawer.draw_samples("other = 1\n")
    again, _ = drawer.draw_samples(SOURCE)
    assert ids_of(first) == ids_of(again) == ids_of(draw(small, SOURCE, seed=7)[0])
    assert ids_of(first) != ids_of(draw(small, SOURCE, seed=8)[0])


def test_texts_get_gaps_of_their_own(small):
    """Else every file would have its gaps in the same places."""
    (one,), _ = draw(small, "a" * 100)
    (other,), _ = draw(small, "b" * 100)
    hole = small.convert_tokens_to_ids("<｜fim▁hole｜>")
    assert one.token_ids.tolist().index(hole) != other.token_ids.tolist().index(hole)


def test_a_window_in_which_no_gap_has_text_is_left_out_and_counted(small):
    blanks = " " * 3000 + "x\n"
    samples, windows = draw(small, blanks, max_length=5000)
    assert (samples, windows) == ([], {"used": 0, "left out": 1})


@pytest.mark.parametrize("text", ["ab = 你\n" * 5, "print the value of Response\n" * 9])
@pytest.mark.parametrize("max_length", [8, 9, 12])
def test_hardly_any_room_is_room_enough(small, text, max_length):
    """Of the second text a gap within a word makes more tokens than there is room for."""
    samples, windows = draw(small, text, max_length)
    assert windows["used"] == len(samples) > 0
    assert max(len(sample.token_ids) for sample in samples) <= max_length
