"""Known text with known ids, for tokenizers whose silent damage would ruin a fine-tune. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownTokenizer:
    """A published tokenizer and what it must answer.

    Attributes:
        name: Name for messages.
        signature: Tokens with their ids by which a vocabulary claims to be this tokenizer's.
        vectors: Text and the ids it must get (decimal, separated by blanks), without special tokens added.
    """

    name: str
    signature: Mapping[str, int]
    vectors: tuple[tuple[str, str], ...]

    def is_claimed_by(self, vocabulary: Mapping[str, int]) -> bool:
        """Return whether a vocabulary holds all tokens of the signature at their ids."""
        return all(vocabulary.get(token) == token_id for token, token_id in self.signature.items())


DEEPSEEK_CODER = KnownTokenizer(
    name="DeepSeek-Coder",
    signature={
        "<｜begin▁of▁sentence｜>": 32013,
        "<｜end▁of▁sentence｜>": 32014,
        "<｜fim▁hole｜>": 32015,
        "<|EOT|>": 32021,
    },
    vectors=(
        ("def add(a, b):\n    return a + b\n", "1551 957 7 64 11 270 1772 185 315 967 245 945 270 185"),
        (
            "\tif (i < n) {\n\t\tout[i] = x[i] * 2.0f;\n\t}\n",
            "2944 334 72 1013 291 8 507 185 184 184 406 58 72 60 405 1371 58 72 60 572 207 17 13 15 69 26 185 1839 185",
        ),
        ("a  b   c    d     e", "64 207 270 243 258 315 263 251 300"),
        ("\n\n\n", "185 185 185"),
        ("        ", "294"),
        ("x = 12345", "87 1412 16 17 18 19 20"),
        ("naïve café", "2479 2854 312 26632 584"),
        ("你好,世界", "1367 1248 11 4986"),
        (
            "### Instruction:\nSort a list.\n\n### Response:\n",
            "13518 3649 3475 25 185 25409 245 1517 13 185 185 13518 21289 25 185",
        ),
        ("<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>", "32016 64 32015 65 32017"),
        ("<|fim_begin|>", "27 91 69 308 62 946 91 29"),
        ('print("hi")\r\n', "4128 1195 4821 2456 188 185"),
        ("<|EOT|>", "32021"),
        ("α β γ; Привет мир", "10829 7559 110 7559 111 26 15782 9210 7185 342"),
        ("__global__ void fill(float *y, int n)", "1437 12469 1437 2494 3278 7 9986 572 88 11 1097 291 8"),
    ),
)
"""Shared by the base and instruct models of 1.3B, 6.7B and 33B; the signature tokens stand outside its 32,000 merges,
so a tokenizer that mangles text still carries them."""

KNOWN_TOKENIZERS = (DEEPSEEK_CODER,)
