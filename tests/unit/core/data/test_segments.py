import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dsft.core.data import segments
from dsft.core.data.segments import Segment, SegmentEncoder
from dsft.core.errors import TokenizerError
from tests.unit.core.data.small_tokenizer import BOS, EOS, EOT, FIM_HOLE, make_deepseek_like, make_prefixing

PLAIN = [
    "def f(x):\n\treturn x  # naïve 你好 \U0001f600 õ÷",
    "a  b   c\r\n\r\n",
    "",
    " ",
    "<|fim_begin|> < | <|",
]


def plain(text: str) -> Segment:
    return Segment(text, False, parse_special=False)


def parsed(text: str) -> Segment:
    return Segment(text, False, parse_special=True)


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_gets_the_ids_of_the_tokenizer(deepseek: PreTrainedTokenizerFast, text: str) -> None:
    encoder = SegmentEncoder(deepseek)
    expected = deepseek(text, add_special_tokens=False)["input_ids"]
    assert encoder.encode_prompt([plain(text)]) == expected
    assert encoder.encode_prompt([parsed(text)]) == expected


def test_real_data_gets_the_same_ids_as_from_the_tokenizer(deepseek: PreTrainedTokenizerFast, shared) -> None:
    text = (shared / "data" / "mbpp.jsonl").read_text()[:200_000]
    encoded = SegmentEncoder(deepseek).encode([[plain(line)] for line in text.split("\n")])
    expected = deepseek(text.split("\n"), add_special_tokens=False)["input_ids"]
    assert encoded.token_ids.tolist() == [token_id for ids in expected for token_id in ids]
    assert encoded.lengths.tolist() == [len(ids) for ids in expected]


@pytest.mark.parametrize("token", [EOT, EOS, BOS, FIM_HOLE, "<pad>"])
def test_quoted_control_tokens_stay_text(small: PreTrainedTokenizerFast, token: str) -> None:
    encoder = SegmentEncoder(small)
    text = f"stop at {token}, é\n"
    ids = encoder.encode_prompt([plain(text)])
    assert not set(ids) & set(encoder.control_tokens.values())
    assert encoder.decode(ids) == text
    assert encoder.encode_prompt([plain("õ")]) == small("õ", add_special_tokens=False)["input_ids"]
    assert small.convert_tokens_to_ids(token) in encoder.encode_prompt([parsed(text)])


def test_known_ids_of_a_quoted_end_of_turn(deepseek: PreTrainedTokenizerFast) -> None:
    encoder = SegmentEncoder(deepseek)
    assert encoder.encode_prompt([plain(EOT)]) == [27, 91, 36, 2778, 91, 29]
    assert encoder.encode_prompt([parsed(EOT)]) == [32021]
    assert encoder.encode_prompt([plain("<pad>")]) == [27, 8836, 29]


def test_the_tokenizer_s_own_settings_do_not_matter(deepseek: PreTrainedTokenizerFast) -> None:
    deepseek.backend_tokenizer.enable_truncation(2)
    deepseek.backend_tokenizer.enable_padding(length=50)
    try:
        assert len(SegmentEncoder(deepseek).encode_prompt([plain("one two three four")])) == 4
    finally:
        deepseek.backend_tokenizer.no_truncation()
        deepseek.backend_tokenizer.no_padding()


def test_bos_is_what_the_tokenizer_adds() -> None:
    with_bos, without = SegmentEncoder(make_deepseek_like()), SegmentEncoder(make_deepseek_like(adds_bos=False))
    assert [segment.text for segment in with_bos.bos_segments] == [BOS]
    assert without.bos_segments == []


def test_a_continued_text_gets_no_blank_of_its_own() -> None:
    tokenizer = make_prefixing()
    encoder = SegmentEncoder(tokenizer)
    ids = encoder.encode_prompt([*encoder.bos_segments, plain("ab\n"), plain("cd"), parsed(EOS)])
    assert tokenizer.convert_ids_to_tokens(ids) == [BOS, "▁", "a", "b", "\n", "c", "d", EOS]
    assert ids[:5] == tokenizer("ab\n")["input_ids"], "the prompt as anyone tokenizes it"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_long_texts_get_the_same_ids_in_pieces(
    deepseek: PreTrainedTokenizerFast, repository: Path, monkeypatch, line_end: str
) -> None:
    sources = (path.read_text() for path in sorted((repository / "dsft" / "core" / "data").glob("*.py")))
    text = "".join(sources).replace("\n", line_end)
    expected = deepseek.backend_tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(segments, "PIECE_CHARACTERS", 2000)
    encoded = SegmentEncoder(deepseek).encode([[parsed("x"), parsed(text), parsed("y")]])
    assert encoded.token_ids.tolist()[1:-1] == expected
    assert encoded.lengths.tolist() == [1, len(expected), 1]


def test_a_text_without_a_place_to_cut_keeps_its_characters(small: PreTrainedTokenizerFast, monkeypatch) -> None:
    monkeypatch.setattr(segments, "PIECE_CHARACTERS", 100)
    encoder = SegmentEncoder(small)
    text = "é" * 1001
    assert encoder.decode(encoder.encode_prompt([plain(text)])) == text


def test_a_vocabulary_that_spells_control_tokens_is_refused() -> None:
    tokenizer = make_prefixing()
    backend = tokenizer.backend_tokenizer
    # "<s>" in the vocabulary and reachable by merges: plain text would become the control token.
    settings = json.loads(backend.to_str())
    settings["model"]["vocab"] |= {"<s": 500, "<s>": 501}
    settings["model"]["merges"] = [["<", "s"], ["<s", ">"]]
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": 501, "content": "<s>"})
    broken = PreTrainedTokenizerFast(
        tokenizer_object=type(backend).from_str(json.dumps(settings)), bos_token=BOS, eos_token=EOS
    )
    encoder = SegmentEncoder(broken)
    assert encoder.encode_prompt([plain("a<b")])
    with pytest.raises(TokenizerError, match="'<s>' of ordinary text"):
        encoder.encode_prompt([plain("a<s>b")])
