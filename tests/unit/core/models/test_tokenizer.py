"""The tokenizer check: the real tokenizer passes, damaged ones are refused."""

import json
import shutil
from pathlib import Path

import pytest

from dsft.core.errors import ModelError, TokenizerError
from dsft.core.models.known_tokenizers import DEEPSEEK_CODER
from dsft.core.models.source import find_model
from dsft.core.models.tokenizer import load_tokenizer


@pytest.fixture
def model_dir(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared / "assets" / "deepseek-coder-6.7b", tmp_path / "model"))


def edit_tokenizer(model_dir: Path, edit) -> None:
    path = model_dir / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_real_tokenizer_passes_by_known_ids(model_dir: Path):
    loaded = load_tokenizer(find_model(str(model_dir)))
    assert loaded.known_as == "DeepSeek-Coder"
    assert load_tokenizer(find_model(str(model_dir))).fingerprint == loaded.fingerprint


def test_the_published_vectors_pass(model_dir: Path):
    """Record by record: the text and the ids another implementation publishes for it."""
    tokenizer = load_tokenizer(find_model(str(model_dir))).tokenizer
    texts = (model_dir / "tokenizer_vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (model_dir / "tokenizer_vectors.out").read_text(encoding="utf-8").splitlines()
    checked = 0
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [int(token) for token in line.split()]
        checked += 1
    assert checked >= 45


def test_a_tokenizer_that_strips_white_space_is_refused(model_dir: Path):
    def strip_white_space(content: dict) -> None:
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": ""}

    edit_tokenizer(model_dir, strip_white_space)
    with pytest.raises(TokenizerError, match="DeepSeek-Coder") as raised:
        load_tokenizer(find_model(str(model_dir)))
    assert "46489" in raised.value.fix


def test_a_stripping_tokenizer_of_an_unknown_model_is_refused_by_round_trip(model_dir: Path):
    def rename_and_strip(content: dict) -> None:
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"[ \t]+"}, "content": " "}
        for token in content["added_tokens"]:
            if token["content"] == "<|EOT|>":
                token["content"] = "<|other|>"

    edit_tokenizer(model_dir, rename_and_strip)
    with pytest.raises(TokenizerError, match="does not give back"):
        load_tokenizer(find_model(str(model_dir)))


def test_a_merge_that_is_missing_changes_ids_and_is_refused(model_dir: Path):
    edit_tokenizer(model_dir, lambda content: content["model"]["merges"].pop(0))
    with pytest.raises(TokenizerError, match="instead of"):
        load_tokenizer(find_model(str(model_dir)))


def test_a_tokenizer_without_an_end_token_is_refused(model_dir: Path):
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="no end token"):
        load_tokenizer(find_model(str(model_dir)))


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_missing_or_broken_tokenizer_is_a_model_error(model_dir: Path, content: str | None):
    (model_dir / "tokenizer.json").unlink()
    if content is not None:
        (model_dir / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer"):
        load_tokenizer(find_model(str(model_dir)))


def test_the_fingerprint_follows_what_decides_the_ids(model_dir: Path):
    before = load_tokenizer(find_model(str(model_dir))).fingerprint
    (model_dir / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(find_model(str(model_dir))).fingerprint != before


def test_look_alikes_of_fim_tokens_are_known_as_plain_text():
    vectors = dict(DEEPSEEK_CODER.vectors)
    assert len(vectors["<|fim_begin|>"].split()) > 1
    ids = vectors["<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"].split()
    assert ids[::2] == ["32016", "32015", "32017"]
