"""What a decoder does, whatever it is made of: it holds what a model has read, and reads on."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Decoder(Protocol):
    """A model with the keys and values of one or several texts that it has read, the rows.

    Logits are float32, on the decoder's device, and valid until its next call.
    """

    @property
    def device(self) -> "torch.device":
        """Where token ids are expected and logits come."""

    @property
    def max_rows(self) -> int:
        """Most texts at once."""

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> "torch.Tensor":
        """Read prompts, one for each row, and forget what was there.

        A single prompt that begins as the only row does is read from where they part.

        Args:
            prompts: Token ids, at least one in each.
            max_new_tokens: Most tokens that will be read after them, in each row.

        Returns:
            Logits of the token after each prompt, [num_prompts, vocab_size].
        """

    def step(self, token_ids: "torch.Tensor") -> "torch.Tensor":
        """Read one more token in each row.

        Args:
            token_ids: int64 [num_rows].

        Returns:
            Logits of the tokens after them, [num_rows, vocab_size].
        """

    def know(self, token_ids: Sequence[int]) -> None:
        """Take note of the tokens that the last step has read, once they have come from the device."""

    def extend(self, token_ids: Sequence[int]) -> "torch.Tensor":
        """Read several tokens of the only row at once.

        Returns:
            Logits of the tokens after each of them, [num_tokens, vocab_size].
        """

    def rewind(self, num_tokens: int) -> None:
        """Forget the last tokens of the only row."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""

    def reset(self) -> None:
        """Forget everything and give its memory back; after an exception a decoder must not be used before this."""

    def without_adapter(self) -> AbstractContextManager[None]:
        """Let the base model alone compute for a while; forgets everything at both ends."""
