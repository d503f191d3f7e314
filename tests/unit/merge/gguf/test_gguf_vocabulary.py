"""Tokens, types, merges and special ids of a GGUF file against the tokenizer they come from; and what is refused."""

import json
from pathlib import Path

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from dsft.core.errors import ModelError
from dsft.core.models.source import find_model
from dsft.core.models.tokenizer import load_tokenizer
from dsft.merge.gguf.vocabulary import TokenType, read_gguf_vocabulary
from tests.conftest import REPOSITORY
from tests.gguf_models import (
    make_model,
    plan_small,
    read_fields,
    small_config,
    tiny_tokenizer,
    weights_of,
    write_small,
)
from tests.gguf_tokenizers import DIGITS, WORDS, byte_level, edit_tokenizer, sequence, split


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def deepseek() -> PreTrainedTokenizerFast:
    """The published tokenizer, where it is at hand."""
    folder = REPOSITORY.parent / "shared" / "assets" / "deepseek-coder-6.7b"
    if not folder.is_dir():
        pytest.skip("there is no ../shared beside the repository")
    return load_tokenizer(find_model(str(folder))).tokenizer


def test_fields_are_the_tokenizers(tmp_path: Path, tiny) -> None:
    config = small_config()
    content = json.loads(tiny.backend_tokenizer.to_str())
    turn_end = tiny.convert_tokens_to_ids("<|EOT|>")
    fields = read_fields(
        write_small(
            tmp_path / "m.gguf",
            "f16",
            make_model(config),
            config,
            stop_token_ids=[tiny.eos_token_id, turn_end],
            chat_template="{{ messages }}",
        )
    )
    tokens = fields.pop("tokenizer.ggml.tokens")
    assert tokens[: len(tiny)] == tiny.convert_ids_to_tokens(range(len(tiny)))
    assert tokens[len(tiny) :] == [f"[PAD{row}]" for row in range(len(tiny), 2080)]
    types = fields.pop("tokenizer.ggml.token_type")
    added = {entry["id"] for entry in content["added_tokens"]}
    assert {row for row, kind in enumerate(types) if kind == gguf.TokenType.UNUSED} == set(range(len(tiny), 2080))
    assert {row for row, kind in enumerate(types) if kind not in (1, gguf.TokenType.UNUSED)} == added
    assert [tuple(merge.split(" ")) for merge in fields.pop("tokenizer.ggml.merges")] == [
        tuple(merge) for merge in content["model"]["merges"]
    ]
    assert {key: value for key, value in fields.items() if key.startswith("tokenizer.")} == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-coder",
        "tokenizer.ggml.bos_token_id": tiny.bos_token_id,
        "tokenizer.ggml.eos_token_id": tiny.eos_token_id,
        "tokenizer.ggml.padding_token_id": tiny.pad_token_id,
        "tokenizer.ggml.eot_token_id": turn_end,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


def test_deepseek_coders_added_tokens_have_the_types_that_keep_their_ids(deepseek) -> None:
    vocabulary = read_gguf_vocabulary(deepseek, 32256, [32014, 32021])
    assert vocabulary.pre_tokenizer == "deepseek-coder"
    # Letters of bytes that UTF-8 never has; as text of their own they are found before the text is split.
    assert set(vocabulary.types[32000:32013]) == {TokenType.USER_DEFINED}
    assert vocabulary.tokens[32009] == "ü"
    assert set(vocabulary.types[32013:32022]) == {TokenType.CONTROL}
    assert vocabulary.tokens[32013:32016] == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>")
    assert vocabulary.tokens[32021:32023] == ("<|EOT|>", "[PAD32022]")
    assert set(vocabulary.types[32022:]) == {TokenType.UNUSED} and len(vocabulary.types) == 32256
    assert set(vocabulary.types[:32000]) == {TokenType.NORMAL}
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (32013, 32014, 32014)
    assert (vocabulary.end_of_turn_id, vocabulary.end_of_message_id, vocabulary.unknown_id) == (32021, None, None)


def test_an_added_token_of_no_delimiters_form_stays_text(tiny) -> None:
    content = json.loads(tiny.backend_tokenizer.to_str())
    entry = {**content["added_tokens"][0], "id": 2048, "content": "<think>", "special": False}
    edited = edit_tokenizer(tiny, added_tokens=[*content["added_tokens"], entry])
    assert read_gguf_vocabulary(edited, 2080, []).types[2048] == TokenType.USER_DEFINED
    # A token that ends an answer is not part of it.
    stopping = read_gguf_vocabulary(edited, 2080, [2048])
    assert stopping.types[2048] == TokenType.CONTROL and stopping.end_of_turn_id == 2048


def test_begin_and_end_are_added_as_the_tokenizer_adds_them(tiny) -> None:
    bare = edit_tokenizer(tiny, post_processor=None)
    assert (read_gguf_vocabulary(bare, 2080, []).adds_bos, read_gguf_vocabulary(tiny, 2080, []).adds_bos) == (
        False,
        True,
    )
    content = json.loads(tiny.backend_tokenizer.to_str())
    processor = content["post_processor"]
    end = {"SpecialToken": {"id": tiny.eos_token, "type_id": 0}}
    special = {tiny.eos_token: {"id": tiny.eos_token, "ids": [tiny.eos_token_id], "tokens": [tiny.eos_token]}}
    ended = processor | {"single": [*processor["single"], end]}
    ended["special_tokens"] = processor["special_tokens"] | special
    assert read_gguf_vocabulary(edit_tokenizer(tiny, post_processor=ended), 2080, []).adds_eos
    twice = ended | {"single": [*ended["single"], end]}
    with pytest.raises(ModelError, match="more than"):
        read_gguf_vocabulary(edit_tokenizer(tiny, post_processor=twice), 2080, [])


@pytest.mark.parametrize(
    ("name", "ignore_merges", "steps"),
    [
        ("gpt-2", False, byte_level(True)),
        ("gpt-2", False, sequence(byte_level(True, trim_offsets=False))),
        ("smollm", False, sequence(DIGITS, byte_level(True))),
        ("llama-bpe", True, sequence(split(WORDS % r"\p{N}{1,3}"), byte_level(False))),
        ("qwen2", False, sequence(split(WORDS % r"\p{N}"), byte_level(False))),
    ],
)
def test_other_pre_tokenizers_are_known_by_their_steps(tiny, name, ignore_merges, steps) -> None:
    edited = edit_tokenizer(tiny, pre_tokenizer=steps, model={"ignore_merges": ignore_merges})
    assert read_gguf_vocabulary(edited, 2080, []).pre_tokenizer == name


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"pre_tokenizer": None}, "splits text in a way"),
        ({"pre_tokenizer": byte_level(True, add_prefix_space=True)}, "splits text in a way"),
        ({"pre_tokenizer": byte_level(False)}, "splits text in a way"),
        ({"pre_tokenizer": sequence(DIGITS | {"individual_digits": False}, byte_level(True))}, "Digits, ByteLevel"),
        ({"pre_tokenizer": sequence(split(WORDS % r"\p{N}{1,2}"), byte_level(False))}, "Split .*1,2"),
        ({"model": {"ignore_merges": True}}, "ignore_merges: true"),
        ({"pre_tokenizer": sequence(split(WORDS % r"\p{N}{1,3}"), byte_level(False))}, "ignore_merges: false"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"model": {"byte_fallback": True}}, "no byte-level BPE"),
        ({"decoder": {"type": "Fuse"}}, "no byte-level BPE"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"unk_token": "!"}}, "unk_token"),
    ],
)
def test_a_tokenizer_that_would_get_other_ids_is_refused(tiny, changes, found) -> None:
    edited = edit_tokenizer(tiny, **changes)
    with pytest.raises(ModelError, match=found):
        read_gguf_vocabulary(edited, 2080, [])


@pytest.mark.parametrize("setting", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_takes_its_neighbours_is_refused(tiny, setting) -> None:
    content = json.loads(tiny.backend_tokenizer.to_str())
    added = [{**entry, setting: entry["content"] == "<|EOT|>"} for entry in content["added_tokens"]]
    with pytest.raises(ModelError, match=rf"<\|EOT\|>' has {setting}"):
        read_gguf_vocabulary(edit_tokenizer(tiny, added_tokens=added), 2080, [])


def test_more_tokens_than_rows_are_refused_and_as_many_are_not(tiny) -> None:
    assert len(read_gguf_vocabulary(tiny, len(tiny), []).tokens) == len(tiny)
    with pytest.raises(ModelError, match=f"the token {len(tiny) - 1}, and the model has {len(tiny) - 1} rows"):
        read_gguf_vocabulary(tiny, len(tiny) - 1, [])
    with pytest.raises(ModelError, match="the token 5000"):
        read_gguf_vocabulary(tiny, 2080, [5000])


def test_three_tokens_may_end_an_answer_and_a_fourth_is_refused(tiny) -> None:
    vocabulary = read_gguf_vocabulary(tiny, 2080, [7, tiny.eos_token_id, 9, 7])
    assert (vocabulary.eos_id, vocabulary.end_of_turn_id, vocabulary.end_of_message_id) == (tiny.eos_token_id, 7, 9)
    with pytest.raises(ModelError, match="any of 4 tokens"):
        read_gguf_vocabulary(tiny, 2080, [7, 8, 9])


def test_composed_characters_are_told_of(tiny) -> None:
    config = small_config()
    weights = weights_of(make_model(config))
    edited = edit_tokenizer(
        tiny, normalizer={"type": "NFC"}, pre_tokenizer=sequence(split(WORDS % r"\p{N}"), byte_level(False))
    )
    assert [notice for notice in plan_small("f16", weights, config, edited).notices if "NFC" in notice]
    assert not plan_small("f16", weights, config, tiny).notices
