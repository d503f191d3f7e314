"""Decoding by the model's own forward pass in transformers: any family, any device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_MAX_ROWS = 32


class PlainDecoder:
    """A decoder over transformers' modules and their cache.

    Args:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: "PreTrainedModel | PeftModel") -> None:
        self._model = model
        self._cache: Any = None
        self._texts: list[list[int]] = []  # what was read, row by row
        self._mask: torch.Tensor | None = None  # int64 [num_rows, num_positions]; None where no row is padded
        # Families with another kind of state than keys and values read the whole text again for each token.
        self._keeps_cache = True

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self._model.device
        return device

    @property
    def max_rows(self) -> int:
        """Most texts at once."""
        return _MAX_ROWS if self._keeps_cache else 1

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        """Read prompts; see `Decoder`."""
        if len(prompts) == 1:
            num_kept = self._keep_common(prompts[0])
            return self.extend_last(prompts[0][num_kept:])
        self.reset()
        width = max(map(len, prompts))
        rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self._texts = [list(prompt) for prompt in prompts]
        is_padded = len(set(map(len, prompts))) > 1
        self._mask = torch.tensor(masks, dtype=torch.int64, device=self.device) if is_padded else None
        return self._forward(torch.tensor(rows, dtype=torch.int64, device=self.device), num_logits=1)[:, -1]

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Read one more token in each row; see `Decoder`."""
        for text, token_id in zip(self._texts, token_ids.tolist(), strict=True):
            text.append(token_id)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._texts), 1)], dim=1)
        return self._forward(token_ids[:, None], num_logits=1)[:, -1]

    def extend(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read several tokens of the only row; see `Decoder`."""
        return self._read(token_ids, num_logits=len(token_ids))

    def extend_last(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read several tokens of the only row; return the logits after the last one alone, [1, vocab_size]."""
        return self._read(token_ids, num_logits=1)

    def rewind(self, num_tokens: int) -> None:
        """Forget the last tokens of the only row; see `Decoder`."""
        if num_tokens == 0:
            return
        text = self._texts[0][:-num_tokens]
        if self._can_crop():
            self._cache.crop(-num_tokens)
            self._texts = [text]
        else:  # a window or another state that can't go back: it is read again
            self.reset()
            self.extend_last(text)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone; see `Decoder`."""
        indices = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        self._texts = [self._texts[row] for row in rows]
        if self._cache is not None:
            self._cache.batch_select_indices(indices)
        if self._mask is not None:
            self._mask = self._mask[indices]

    def reset(self) -> None:
        """Forget everything; see `Decoder`."""
        self._cache, self._texts, self._mask = None, [], None

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Let the base model alone compute for a while; see `Decoder`."""
        from peft import PeftModel

        self.reset()
        if isinstance(self._model, PeftModel):
            with self._model.disable_adapter():
                yield
        else:
            yield
        self.reset()

    def _keep_common(self, prompt: Sequence[int]) -> int:
        """Keep what the only row has in common with a prompt; return how many tokens that is."""
        num_common = 0
        if len(self._texts) == 1 and self._can_crop():
            text = self._texts[0]
            limit = min(len(text), len(prompt) - 1)  # the last token is read again: its logits are wanted
            while num_common < limit and text[num_common] == prompt[num_common]:
                num_common += 1
        if num_common == 0:
            self.reset()
        else:
            self.rewind(len(self._texts[0]) - num_common)
        return num_common

    def _read(self, token_ids: Sequence[int], num_logits: int) -> torch.Tensor:
        if not self._texts:
            self._texts = [[]]
        self._texts[0].extend(token_ids)
        return self._forward(torch.tensor([list(token_ids)], dtype=torch.int64, device=self.device), num_logits)[0]

    def _can_crop(self) -> bool:
        from transformers.cache_utils import DynamicLayer

        return self._cache is not None and all(type(layer) is DynamicLayer for layer in self._cache.layers)

    @torch.no_grad()
    def _forward(self, token_ids: torch.Tensor, num_logits: int) -> torch.Tensor:
        """Return the logits at the last positions, [num_rows, num_logits, vocab_size]."""
        if not self._keeps_cache:
            token_ids = torch.tensor(self._texts, dtype=torch.int64, device=self.device)
        arguments: dict[str, Any] = {}
        if self._mask is not None:
            positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
            arguments = {"attention_mask": self._mask, "position_ids": positions[:, -token_ids.shape[1] :]}
        output = self._model(
            input_ids=token_ids,
            past_key_values=self._cache,
            use_cache=self._keeps_cache,
            logits_to_keep=num_logits,
            **arguments,
        )
        if self._keeps_cache:
            self._cache = getattr(output, "past_key_values", None)
            self._keeps_cache = self._cache is not None
        logits: torch.Tensor = output.logits[:, -num_logits:]
        return logits.float()
