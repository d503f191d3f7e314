"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer's own does.

llama.cpp knows them by name and has their patterns in its code (`llm_tokenizer_bpe` in `src/llama-vocab.cpp`); a
tokenizer.json has the patterns and no name. A name is given only where both say the same.
"""

import json
from typing import Any

_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_GPT2_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _words(digits: str) -> dict[str, Any]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return _split(pattern)


_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_KNOWN: tuple[tuple[str, bool, list[dict[str, Any]]], ...] = (
    (
        "deepseek-coder",
        False,
        [
            *(_split(pattern) for pattern in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)),
            _SINGLE_DIGITS,
            _BYTES_ONLY,
        ],
    ),
    ("smollm", False, [_SINGLE_DIGITS, _GPT2_WORDS]),
    ("gpt-2", False, [_GPT2_WORDS]),
    ("llama-bpe", True, [_words(r"\p{N}{1,3}"), _BYTES_ONLY]),
    ("qwen2", False, [_words(r"\p{N}"), _BYTES_ONLY]),
)
"""Name, whether a word that is a token is taken whole without its merges (`ignore_merges`), and the steps."""


def find_pre_tokenizer(tokenizer_json: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json, None where it has none that dsft is sure of.

    Args:
        tokenizer_json: The content of tokenizer.json.
    """
    steps = _as_steps(tokenizer_json.get("pre_tokenizer"))
    ignores_merges = bool(tokenizer_json["model"].get("ignore_merges", False))
    return next((name for name, ignores, known in _KNOWN if (ignores, known) == (ignores_merges, steps)), None)


def describe_pre_tokenizer(tokenizer_json: dict[str, Any]) -> str:
    """Return the steps of a pre-tokenizer in a few words, for a message."""
    words = [
        f"{step.get('type')} {json.dumps(step['pattern'].get('Regex', ''))}" if "pattern" in step else str(step["type"])
        for step in _as_steps(tokenizer_json.get("pre_tokenizer"))
    ]
    return ", ".join(words) or "none"


def _as_steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _as_steps(part)]
    # Where offsets are trimmed decides no id.
    return [{key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}]
