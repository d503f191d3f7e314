"""Loading a tokenizer and refusing one that would ruin a fine-tune.

Some versions of transformers strip all white space from DeepSeek-Coder's input (transformers#46489, #43975); a model
trained on that is ruined without any error. So every tokenizer must give back the text it was given, and one that
says it is DeepSeek-Coder's must give known ids for known text.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsft.core.errors import ModelError, TokenizerError
from dsft.core.models.known_tokenizers import KNOWN_TOKENIZERS, KnownTokenizer
from dsft.core.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROUND_TRIP_TEXTS = (
    "def scale(values, factor):\n    return [v * factor for v in values]\n",
    "if (x  ==   y) {\n\t\treturn;\n\t}\n\n\n// end",
    "a\tb\t\tc  d    e        f",
    "print('caf\u00e9, \u4f60\u597d, \U0001f600')\n",
    "x = 1234567890 + 0x1F - 3.14e-10",
)
"""White space of every kind between words, and text outside ASCII; no leading or trailing blanks, which some
SentencePiece tokenizers normalise by design."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer that passed the check.

    Attributes:
        tokenizer: A fast tokenizer of transformers.
        fingerprint: SHA-256 (hex) of everything that decides its ids.
        known_as: Name of the known tokenizer its ids were compared with; None where only round trips could be checked.
    """

    tokenizer: "PreTrainedTokenizerFast"
    fingerprint: str
    known_as: str | None


def load_tokenizer(source: ModelSource) -> LoadedTokenizer:
    """Load and check the tokenizer of a model.

    Raises:
        ModelError: The model has no fast tokenizer.
        TokenizerError: The tokenizer changes text, or its ids are not the known ones.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.load_arguments)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"The tokenizer of {source.name} can't be loaded: {first_line}",
            "The model needs its tokenizer.json beside config.json.",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{source.name} has no tokenizer.json, and dsft needs a fast tokenizer.",
            "Convert it with transformers: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(DIR).",
        )
    known_as = check_tokenizer(tokenizer, source.name)
    serialized: str = tokenizer.backend_tokenizer.to_str()
    facts = f"{serialized}\0{tokenizer.bos_token_id}\0{tokenizer.eos_token_id}\0{tokenizer.chat_template}"
    return LoadedTokenizer(tokenizer, hashlib.sha256(facts.encode()).hexdigest(), known_as)


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast", name: str) -> str | None:
    """Check that a tokenizer keeps text exactly, and known tokenizers by their ids.

    Args:
        tokenizer: The tokenizer as it will be used.
        name: The model's name, for the message.

    Returns:
        The known tokenizer's name, or None.

    Raises:
        TokenizerError: What it got wrong, with the text and both results.
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"The tokenizer of {name} has no end token, so a model trained with it would never stop.",
            "Set eos_token in its tokenizer_config.json.",
        )
    known = next((known for known in KNOWN_TOKENIZERS if known.is_claimed_by(tokenizer.get_vocab())), None)
    if known is not None:
        _check_ids(tokenizer, known, name)
    for text in ROUND_TRIP_TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if decoded.strip() != text.strip():
            raise TokenizerError(
                f"The tokenizer of {name} does not give back the text it was given: {text!r} became {decoded!r}.",
                _FIX,
            )
    return None if known is None else known.name


def _check_ids(tokenizer: "PreTrainedTokenizerFast", known: KnownTokenizer, name: str) -> None:
    for text, expected in known.vectors:
        ids = " ".join(str(token_id) for token_id in tokenizer(text, add_special_tokens=False)["input_ids"])
        if ids != expected:
            raise TokenizerError(
                f"The tokenizer of {name} says it is {known.name}'s but gives {text!r} the ids {ids} "
                f"instead of {expected}.",
                _FIX,
            )


_FIX = (
    "Known cause: transformers 5.0 to 5.22 strip white space for some copies of this tokenizer "
    "(transformers#46489); install transformers 5.23 or newer and copy tokenizer.json again from the model's page."
)
