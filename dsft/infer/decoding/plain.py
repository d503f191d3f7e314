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
        # Families that return no state read the whole text again for each token; the first pass shows it.
        self._keeps_cache: bool | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self._model.device
        return device

    @property
    def max_rows(self) -> int:
        """Most texts at once."""
        if self._keeps_cache is None:
            self.extend_last([0])
            self.reset()
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
        self._lengthen_mask(1)
        return self._forward(token_ids[:, None], num_logits=1)[:, -1]

    def know(self, token_ids: Sequence[int]) -> None:
        """Nothing to note: a step knows its tokens; see `Decoder`."""

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
            if self._mask is not None:
                self._mask = self._mask[:, :-num_tokens]
        elif self._keeps_cache is False:
            self._texts = [text]
        else:  # a window or another state that can't go back: it is read again
            self.reset()
            self.extend_last(text)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone; see `Decoder`."""
        indices = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        self._texts = [self._texts[row] for row in rows]
        if self._cache is not None:
            self._cache.reorder_cache(indices)  # recurrent layers have no other way to choose rows
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
        try:
            if isinstance(self._model, PeftModel):
                with self._model.disable_adapter():
                    yield
            else:
                yield
        finally:  # after an error too: the base's keys and values must not be gone on with
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
        if self._is_recurrent() and len(token_ids) > 1:  # some families take several tokens for the text's beginning
            logits = torch.cat([self._read([token_id], num_logits=1) for token_id in token_ids])
            return logits[-num_logits:]
        self._texts[0].extend(token_ids)
        self._lengthen_mask(len(token_ids))
        return self._forward(torch.tensor([list(token_ids)], dtype=torch.int64, device=self.device), num_logits)[0]

    def _lengthen_mask(self, num_tokens: int) -> None:
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._texts), num_tokens)], dim=1)

    def _can_crop(self) -> bool:
        from transformers.cache_utils import DynamicLayer

        return self._cache is not None and all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def _is_recurrent(self) -> bool:
        from transformers.cache_utils import LinearAttentionCacheLayerMixin

        return self._cache is not None and any(
            isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self._cache.layers
        )

    @torch.no_grad()
    def _forward(self, token_ids: torch.Tensor, num_logits: int) -> torch.Tensor:
        """Return the logits at the last positions, [num_rows, num_logits, vocab_size]."""
        keeps_cache = self._keeps_cache is not False
        if not keeps_cache:
            token_ids = torch.tensor(self._texts, dtype=torch.int64, device=self.device)
        output = self._model(
            input_ids=token_ids,
            attention_mask=self._mask,
            position_ids=self._find_positions(token_ids.shape[1]),
            past_key_values=self._cache,
            use_cache=keeps_cache,
            logits_to_keep=num_logits,
        )
        if keeps_cache:
            self._cache = getattr(output, "past_key_values", None)
            self._keeps_cache = self._cache is not None
        logits: torch.Tensor = output.logits[:, -num_logits:]
        return logits.float()

    def _find_positions(self, num_tokens: int) -> torch.Tensor:
        """Return the positions of the last tokens, [num_rows or 1, num_tokens]; not every family counts them itself."""
        if self._mask is None:
            end = len(self._texts[0])
            return torch.arange(end - num_tokens, end, device=self.device)[None]
        return (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -num_tokens:]
