"""What is written of a merged model, whatever the file format: named tensors whose rows come in float32."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged model.

    Attributes:
        name: Its name in the transformers checkpoint, e.g. `model.layers.0.self_attn.q_proj.weight`.
        shape: Its shape as stored there.
    """

    name: str
    shape: tuple[int, ...]


class MergedWeights(Protocol):
    """The weights of a merged model before any rounding."""

    @property
    def tensors(self) -> tuple[MergedTensor, ...]:
        """All tensors, in the order they are written; a head that is tied to the embedding is not among them."""
        ...

    def read_float32(self, tensor: MergedTensor) -> "Iterator[torch.Tensor]":
        """Yield a tensor in float32 on the CPU, in pieces of consecutive rows (first dimension), from first to last."""
        ...


def is_finite(values: "torch.Tensor") -> bool:
    """Return whether no number is NaN or infinite; least and greatest tell, many times faster than asking each."""
    import torch

    if values.numel() == 0 or not values.is_floating_point():
        return True
    return all(math.isfinite(value) for value in torch.stack(torch.aminmax(values)).tolist())
