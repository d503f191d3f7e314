"""A tokenizer in GGUF's terms: tokens, their types, merges and special ids, as llama.cpp needs them for equal ids."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from dsft.core.errors import ModelError
from dsft.merge.gguf.pre_tokenizer import describe_pre_tokenizer, find_pre_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenType(IntEnum):
    """GGUF's types of tokens, those that a byte-level BPE has.

    A control token is found in a prompt only by who asks for it, and is not shown in an answer; a user-defined one is
    found in any text before the text is split, and is shown.
    """

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class GgufVocabulary:
    """What llama.cpp needs to give text the tokenizer's ids.

    Attributes:
        pre_tokenizer: llama.cpp's name for how text is split.
        tokens: Text of each token, one for every row of the embedding.
        types: Type of each.
        merges: Pairs, most important first.
        bos_id: Begin token.
        eos_id: End token.
        pad_id: Padding token.
        unknown_id: Token for what the vocabulary lacks.
        end_of_turn_id: A second token that ends an answer.
        end_of_message_id: A third one.
        adds_bos: Whether the tokenizer begins text with the begin token.
        adds_eos: Whether it ends text with the end token.
        normalizes: Whether the tokenizer composes characters (NFC) before it splits, which llama.cpp does not.
    """

    pre_tokenizer: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    unknown_id: int | None
    end_of_turn_id: int | None
    end_of_message_id: int | None
    adds_bos: bool
    adds_eos: bool
    normalizes: bool


def read_gguf_vocabulary(
    tokenizer: "PreTrainedTokenizerFast", num_rows: int, stop_token_ids: Sequence[int]
) -> GgufVocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: As `dsft.core.models.tokenizer` loads and checks it, with an end token.
        num_rows: Rows of the embedding; those beyond the tokenizer's tokens get an unused one.
        stop_token_ids: Tokens that end an answer.

    Raises:
        ModelError: llama.cpp would give some text other ids.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    _refuse_other_models(content)
    pre_tokenizer = find_pre_tokenizer(content)
    if pre_tokenizer is None:
        raise ModelError(
            f"The tokenizer splits text in a way that dsft has no llama.cpp name for: {describe_pre_tokenizer(content)}"
            f" (ignore_merges: {json.dumps(content['model'].get('ignore_merges', False))}).",
            _FIX,
        )
    adds_bos, adds_eos = _read_added_ends(tokenizer)
    others = [token_id for token_id in dict.fromkeys(stop_token_ids) if token_id != tokenizer.eos_token_id]
    if len(others) > 2:
        raise ModelError(
            f"The model's answers end with any of {len(others) + 1} tokens, and GGUF names three at most.", _FIX
        )
    end_of_turn_id, end_of_message_id = [*others, None, None][:2]
    controls = {*others, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    tokens, types = _read_tokens(content, num_rows, controls)
    return GgufVocabulary(
        pre_tokenizer=pre_tokenizer,
        tokens=tokens,
        types=types,
        merges=tuple(_as_line(merge) for merge in content["model"]["merges"]),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        unknown_id=tokenizer.unk_token_id,
        end_of_turn_id=end_of_turn_id,
        end_of_message_id=end_of_message_id,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        normalizes=content.get("normalizer") is not None,
    )


_FIX = "Merge without a GGUF file."


def _refuse_other_models(content: dict[str, Any]) -> None:
    model, decoder, normalizer = content["model"], content.get("decoder"), content.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback") or (decoder or {}).get("type") != "ByteLevel":
        raise ModelError("The tokenizer is no byte-level BPE, and dsft writes no other into a GGUF.", _FIX)
    for setting in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ModelError(
                f"The tokenizer's model has {setting} ({model[setting]!r}), which llama.cpp does not know.", _FIX
            )
    if normalizer not in (None, {"type": "NFC"}):
        raise ModelError(
            f"The tokenizer changes text before it splits (normalizer {normalizer['type']}), and llama.cpp does not.",
            _FIX,
        )


def _read_tokens(
    content: dict[str, Any], num_rows: int, controls: Collection[int | None]
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    texts = {token_id: text for text, token_id in content["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for added in content["added_tokens"]:
        text, token_id = added["content"], added["id"]
        strips = [setting for setting in ("lstrip", "rstrip", "single_word") if added[setting]]
        if strips:
            raise ModelError(f"The token {text!r} has {', '.join(strips)}, which llama.cpp does not know.", _FIX)
        is_control = added["special"] or token_id in controls or _has_control_form(text)
        texts[token_id], types[token_id] = text, TokenType.CONTROL if is_control else TokenType.USER_DEFINED
    beyond = max(*texts, *(token_id or 0 for token_id in controls))
    if beyond >= num_rows:
        raise ModelError(
            f"The tokenizer has the token {beyond}, and the model has {num_rows} rows of embeddings.", _FIX
        )
    tokens = tuple(texts.get(row, f"[PAD{row}]") for row in range(num_rows))
    if len(set(tokens)) < num_rows or "" in tokens:
        raise ModelError("The tokenizer has a token without text, or two of the same text.", _FIX)
    return tokens, tuple(types.get(row, TokenType.UNUSED) for row in range(num_rows))


def _has_control_form(text: str) -> bool:
    """Return whether a token delimits a prompt though its tokenizer calls it ordinary.

    DeepSeek-Coder's end of turn and fill-in-the-middle tokens are such. Ids in a prompt are the same either way;
    llama.cpp types them so too (`does_token_look_special` of its converter).
    """
    is_delimiter = text.endswith(("|>", "｜>")) and text.startswith(("<|", "<｜"))
    return is_delimiter or text == "<pad>"


def _as_line(merge: str | list[str]) -> str:
    first, _, second = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    if not first or not second or " " in first + second:
        raise ModelError(f"The merge {merge!r} can't be written as two words.", _FIX)
    return f"{first} {second}"


def _read_added_ends(tokenizer: "PreTrainedTokenizerFast") -> tuple[bool, bool]:
    """Return whether the tokenizer begins text with its begin token, and ends it with its end token."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for adds_bos in (False, True):
        for adds_eos in (False, True):
            if full == [tokenizer.bos_token_id] * adds_bos + bare + [tokenizer.eos_token_id] * adds_eos:
                return adds_bos, adds_eos
    raise ModelError(
        f"The tokenizer makes {full} of 'a', which is more than {bare} with a begin and an end token around it.", _FIX
    )
