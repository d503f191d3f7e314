"""The size of one forward and backward pass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PassSize:
    """The size of one forward and backward pass.

    Attributes:
        num_tokens: Tokens, T.
        num_targets: Tokens that carry loss, at most T.
        rank: LoRA rank, r.
        value_bytes: Bytes of a value in the compute type, w.
        is_flash: Whether a variable-length flash kernel computes attention.
        has_dropout: Whether LoRA drops a share of its inputs, and so keeps a copy of them and a mask.
    """

    num_tokens: int
    num_targets: int
    rank: int
    value_bytes: int = 2
    is_flash: bool = True
    has_dropout: bool = False

    @property
    def casts_lora(self) -> bool:
        """Whether LoRA's float32 weights are cast to the compute type."""
        return self.value_bytes < 4
