"""The prompts that a merge is verified with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsft.core.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from dsft.core.data.prompts import PromptTemplate

MOST_TOKENS = 32

_TEXTS = (
    "Write a Python function that returns the n-th Fibonacci number without recursion, and explain in one sentence why "
    "it takes linear time and constant memory. Then write three assertions that test it for n = 0, n = 1 and n = 20.",
    "def binary_search(items, target):\n    low, high = 0, len(items) - 1\n    while low <= high:\n        middle = "
    "(low + high) // 2\n        if items[middle] == target:\n            return middle\n        if items[middle] < "
    "target:\n            low = middle + 1\n        else:\n            high = middle - 1\n    return -1\n",
    "__global__ void add(const float *x, const float *y, float *out, int n) {\n    int i = blockIdx.x * blockDim.x + "
    "threadIdx.x;\n    if (i < n) {\n        out[i] = x[i] + y[i];\n    }\n}\n\nint main() {\n    "
    "const int n = 1 << 20;",
    "SELECT customers.name, SUM(orders.total) AS spent FROM customers JOIN orders ON orders.customer_id = customers.id "
    "WHERE orders.created_at >= '2024-01-01' GROUP BY customers.name HAVING SUM(orders.total) > 100 "
    "ORDER BY spent DESC;",
)
"""An instruction and three beginnings of code; each has more tokens than are taken."""


def make_prompts(
    tokenizer: "PreTrainedTokenizerFast",
    template: "PromptTemplate | None",
    trained_rows: Sequence[int],
    vocab_size: int,
) -> "torch.Tensor":
    """Return prompts as token ids of one length, so that none needs padding.

    The last one is no text: it has tokens whose rows of the embedding were trained, and others over the whole
    vocabulary, which texts may never use.

    Args:
        tokenizer: The model's tokenizer.
        template: Prompt template of the run, in which they are written where it takes a text.
        trained_rows: Token ids whose rows of an embedding the adapter holds.
        vocab_size: Rows of the embedding.

    Returns:
        (samples, tokens), int64.
    """
    import torch

    rows = [_encode(text, tokenizer, template) for text in _TEXTS]
    length = min(MOST_TOKENS, *(len(row) for row in rows))
    trained = list(dict.fromkeys(trained_rows))[-(length // 2) :]
    spread = [index * (vocab_size - 1) // (length - 1) for index in range(length)]
    rows.append([*trained, *spread[len(trained) :]])
    return torch.tensor([row[:length] for row in rows], dtype=torch.int64)


def _encode(text: str, tokenizer: "PreTrainedTokenizerFast", template: "PromptTemplate | None") -> list[int]:
    if template is not None:
        try:
            return template.encode_prompt(text)
        except DataError:  # it writes something else than one text
            pass
    return list(tokenizer(text)["input_ids"])
