"""Fill-in-the-middle: whose tokens, gaps that rejoin, and windows of whole lines."""

import numpy as np
import pytest

from dsft.core.data.fim import cut_into_windows, draw_triple, find_fim_tokens
from tests.unit.core.data.small_tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE


def count_characters(texts: list[str]) -> np.ndarray:
    return np.array([len(text) for text in texts], dtype=np.int64)


def cut(text: str, max_characters: int) -> list[str]:
    return list(cut_into_windows(text, max_characters, count_characters))


@pytest.mark.parametrize(
    "tokens",
    [
        (FIM_BEGIN, FIM_HOLE, FIM_END),
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ],
)
def test_each_family_s_tokens_are_known_in_the_order_of_its_training(tokens):
    found = find_fim_tokens(["<|EOT|>", *reversed(tokens)])
    assert (found.before_prefix, found.before_suffix, found.before_middle) == tokens


def test_look_alikes_and_incomplete_sets_are_no_fim_tokens():
    assert find_fim_tokens(["<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"]) is None
    assert find_fim_tokens([FIM_BEGIN, FIM_HOLE, "<fim_middle>"]) is None


def test_the_tokens_of_the_real_tokenizer_are_found(deepseek):
    found = find_fim_tokens(deepseek.get_vocab())
    parts = (found.before_prefix, found.before_suffix, found.before_middle)
    assert [deepseek.convert_tokens_to_ids(part) for part in parts] == [32016, 32015, 32017]


def test_the_parts_of_a_gap_are_the_text_and_any_part_may_be_missing():
    generator = np.random.default_rng(0)
    triples = [draw_triple("abc", generator) for _ in range(300)]
    drawn = {(triple.prefix, triple.middle, triple.suffix) for triple in triples if triple is not None}
    assert drawn == {
        ("", "a", "bc"), ("", "ab", "c"), ("", "abc", ""), ("a", "b", "c"), ("a", "bc", ""), ("ab", "c", ""),
    }  # fmt: skip
    # Two equal positions leave nothing to learn: 4 of the 16 pairs.
    assert 0.15 < triples.count(None) / len(triples) < 0.35


def test_a_middle_of_blanks_is_no_gap():
    generator = np.random.default_rng(0)
    assert all(draw_triple(" \n\t ", generator) is None for _ in range(50))


TEXTS = ["a\nbb\n\nccc\n", "no line end", "é" * 33, "\n\na\r\nb", "one\n" + "x" * 50 + "\ntwo"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_characters", [5, 7, 10, 1000])
def test_windows_fit_and_rejoin(text, max_characters):
    windows = cut(text, max_characters)
    assert all(len(window) <= max_characters for window in windows)
    assert "".join(windows) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_characters", [1, 2, 3])
def test_of_the_smallest_windows_only_blanks_are_left_away(text, max_characters):
    windows = cut(text, max_characters)
    assert all(len(window) <= max_characters and window.strip() for window in windows)
    assert "".join("".join(windows).split()) == "".join(text.split())


def test_windows_hold_as_many_whole_lines_as_fit():
    assert cut("aaa\nbbb\nccc\nddd\n", 11) == ["aaa\nbbb\n", "ccc\nddd\n"]
    assert cut("aaa\nbbb\nccc\n", 12) == ["aaa\nbbb\nccc\n"]


def test_only_a_line_longer_than_a_window_is_cut_inside():
    assert cut("aaa\n" + "b" * 16 + "\nccc\n", 9) == ["aaa\n", "b" * 8, "b" * 8 + "\n", "ccc\n"]


def test_windows_of_nothing_but_blanks_are_left_away():
    assert cut("a\n" + " " * 9 + "\nb\n", 10) == ["a\n", "b\n"]
    assert cut(" \n\n", 10) == cut("", 10) == []


def test_a_character_of_more_tokens_than_a_window_ends_the_cutting():
    windows = cut_into_windows("ab", 1, lambda texts: count_characters(texts) * 4)
    assert list(windows) == ["a", "b"]
