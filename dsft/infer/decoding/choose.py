"""The choice of the next token from its logits, in the order and with the processors of transformers' `generate`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dsft.core.errors import ModelError
from dsft.infer.sampling import Sampling

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

NAN_TOKEN = -1
"""Chosen where logits leave no choice, as NaN does: found out on the device, told when the token is read."""


class TokenChooser:
    """Chooses tokens for some texts.

    Args:
        sampling: How tokens are chosen.
        prompts: Token ids of the texts so far; a repetition penalty counts them.
        device: Where the logits are.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self._processors = _make_processors(sampling)
        self._is_sampling = sampling.temperature > 0
        self._generator = torch.Generator(device)
        if sampling.seed is not None:
            self._generator.manual_seed(sampling.seed)
        # Only the penalty looks at it. A row is padded with its own tokens, which are penalized already.
        self._history: torch.Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            width = max(map(len, prompts))
            rows = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
            self._history = torch.tensor(rows, dtype=torch.int64, device=device)

    @property
    def is_plain_argmax(self) -> bool:
        """Whether each choice depends on its own logits alone."""
        return not self._is_sampling and self._history is None

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose one token for each row.

        Args:
            logits: float32 [num_rows, vocab_size].

        Returns:
            int64 [num_rows]; NAN_TOKEN where the logits are no numbers, or give no probabilities to draw by.
        """
        is_bad = logits.isnan().any(dim=-1)
        if self._processors:
            logits = self._processors(self._history, logits.clone())
        if self._is_sampling:
            shares = torch.softmax(logits, dim=-1)
            total = shares.sum(dim=-1)
            is_bad |= ~(total.isfinite() & (total > 0))
            # Such rows would make the kernel fail, and on a GPU all that comes later, before anyone is told.
            shares = torch.where(is_bad[:, None], 1.0, shares)
            chosen = torch.multinomial(shares, num_samples=1, generator=self._generator).squeeze(1)
        else:
            chosen = logits.argmax(dim=-1)
        chosen = torch.where(is_bad, NAN_TOKEN, chosen)
        if self._history is not None:
            self._history = torch.cat([self._history, chosen.clamp(min=0)[:, None]], dim=1)
        return chosen

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        if self._history is not None:
            self._history = self._history[list(rows)]


def check_token(token_id: int) -> int:
    """Return a chosen token.

    Raises:
        ModelError: The model's outputs were NaN or infinite.
    """
    if token_id == NAN_TOKEN:
        raise ModelError(
            "The model's outputs are NaN or infinite: its weights are damaged or its arithmetic overflowed.",
            "Try --dtype bfloat16 or float32; if that does not help, copy the model again.",
        )
    return token_id


def _make_processors(sampling: Sampling) -> "LogitsProcessorList":
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty))
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(top_k=sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(top_p=sampling.top_p))
    return processors
