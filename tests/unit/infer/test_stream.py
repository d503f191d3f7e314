"""Text from tokens: exact pieces, no half characters, stop strings however the text is cut."""

import random

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dsft.infer.stream import StopStringFilter, TokenDecoder
from tests.scripted_models import EOS, make_tokenizer

TEXTS = ("plain", "café 你好 😀!", "😀", "a\n\n  b\t", "  lead", "👩‍👩‍👧 é")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def decode_all(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    decoder = TokenDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    pieces = decode_all(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(text)  # and each comes as soon as its last byte is there


def test_a_character_comes_with_its_last_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    assert decode_all(tokenizer, tokenizer("a€b")["input_ids"]) == ["a", "", "", "€", "b", ""]


def test_random_bytes_decode_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = random.Random(0)
    for _ in range(200):
        ids = [generator.randrange(256) for _ in range(30)]
        expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(decode_all(tokenizer, ids)) == expected


def test_an_unfinished_character_is_given_out_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("ok €")["input_ids"][:-1]
    assert decode_all(tokenizer, ids) == ["o", "k", " ", "", "", "\ufffd"]


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a")["input_ids"] + [tokenizer.convert_tokens_to_ids(EOS)] + tokenizer("b")["input_ids"]
    assert "".join(decode_all(tokenizer, ids)) == "ab"


def test_a_continuation_keeps_the_blank_that_a_text_of_its_own_loses() -> None:
    vocabulary = {"▁": 0, "▁a": 1, "▁b": 2, "a": 3, "b": 4}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert TokenDecoder(tokenizer).push(2) == "b"
    assert TokenDecoder(tokenizer, continued_ids=[1]).push(2) == " b"


def filter_pieces(stop_strings: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    stop_filter = StopStringFilter(stop_strings)
    passed = ""
    for piece in pieces:
        passed += stop_filter.push(piece)
        if stop_filter.is_stopped:
            return passed, True
    return passed + stop_filter.flush(), False


@pytest.mark.parametrize(
    ("stop_strings", "text", "expected"),
    [
        (("END",), "text END more", "text "),
        (("END",), "text EN", "text EN"),
        (("END",), "EEND", "E"),
        (("aab",), "aaab", "a"),
        (("\n\n", "```"), "x\n``\n```y", "x\n``\n"),
        (("abc", "b"), "zabc", "za"),  # "b" is complete first
        (("bc", "abc"), "zabc", "z"),  # both at once: the longer one
        ((), "anything", "anything"),
    ],
)
def test_stop_strings_end_the_text_however_it_is_cut(stop_strings: tuple[str, ...], text: str, expected: str) -> None:
    is_stopped = expected != text
    for length in range(1, len(text) + 1):
        pieces = [text[start : start + length] for start in range(0, len(text), length)]
        assert filter_pieces(stop_strings, pieces) == (expected, is_stopped)


def test_only_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    stop_filter = StopStringFilter(("###",))
    assert [stop_filter.push(piece) for piece in ("a#", "#", "b", "##")] == ["a", "", "##b", ""]
    assert stop_filter.flush() == "##"
