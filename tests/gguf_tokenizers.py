"""Byte-level tokenizers for the tests of GGUF files: steps of tokenizer.json, edited ones, trained ones, hard texts."""

import json
import random
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> dict[str, Any]:
    """Return a step of tokenizer.json that splits off what a pattern matches."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool, **changes: Any) -> dict[str, Any]:
    """Return the step that turns bytes into letters, with or without GPT-2's pattern for words."""
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return steps | changes


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    """Return several steps as one."""
    return {"type": "Sequence", "pretokenizers": list(steps)}


DIGITS = {"type": "Digits", "individual_digits": True}


def edit_tokenizer(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with parts of its tokenizer.json replaced; `model` is updated and not replaced."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"] |= changes.pop("model", {})
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content | changes)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )


def train_tokenizer(texts: list[str], steps: dict[str, Any], ignore_merges: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of its own vocabulary; its last tokens have no merges, so that `ignore_merges` shows."""
    content = json.loads(Tokenizer(BPE()).to_str()) | {"pre_tokenizer": steps, "decoder": byte_level(True)}
    backend = Tokenizer.from_str(json.dumps(content))
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
    )
    backend.train_from_iterator(texts, trainer)
    trained = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    model = json.loads(backend.to_str())["model"]
    return edit_tokenizer(trained, model={"ignore_merges": ignore_merges, "merges": model["merges"][:-200]})


def random_texts(num_texts: int) -> list[str]:
    """Return short mixtures of everything that splits text: blanks, digits, marks, and letters of many scripts."""
    generator = random.Random(0)
    pool = [chr(code) for code in range(32, 127)] + list("\n\t\r   '")
    pool += list("\u00e9\u0301\u00fc\u00f5\u00c1\u00f7\u03b1\u0411\u4e2d\u9fa5\u9fa6\u3042\u30a2\uac00\u1100\u00a0")
    pool += list("\u0085\u2028\u3000\u00ad\u0660\u0966\u2160\u00bd\U00020000\U0001f600\u200d\ud7ff\u05d0")
    return ["".join(generator.choices(pool, k=generator.randint(1, 12))) for _ in range(num_texts)]
