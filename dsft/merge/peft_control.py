"""PEFT's own merge of a module, rounded: what the output type alone changes, told by another program than dsft."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsft.merge.structure import ADAPTER_NAME

_PIECE_VALUES = 2**22


@dataclass(frozen=True)
class PeftControl:
    """Merges a module's loaded weights as PEFT does, and rounds them.

    Attributes:
        num_samples: Samples in a half of the batch.
        dtype: Type of the merged weights.
    """

    num_samples: int
    dtype: torch.dtype

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight rounded to the type, in float32."""
        return weight.to(self.dtype).float()

    def change(self, unit: nn.Module) -> Callable[..., Any] | None:
        """Merge and round in place; return what runs the module without its adapter."""
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import TrainableTokensWrapper

        forward: Callable[..., Any] | None = None
        if isinstance(unit, LoraLayer):
            _merge(unit)
            forward = unit.get_base_layer()
        elif isinstance(unit, TrainableTokensWrapper):
            unit.token_adapter.merge()
        for parameter in unit.parameters():
            if not parameter.is_meta:
                for piece in torch.split(parameter.data.view(-1), _PIECE_VALUES):
                    piece.copy_(piece.to(self.dtype))
        return forward

    def restore(self, unit: nn.Module) -> None:
        """Let a module forget that it was merged: its weights are read anew."""
        holder: Any = getattr(unit, "token_adapter", unit)
        if getattr(holder, "merged_adapters", None):
            holder.merged_adapters.clear()


def _merge(unit: Any) -> None:
    from peft.tuners.lora import Linear

    has_variant = ADAPTER_NAME in unit.lora_variant
    if type(unit) is not Linear or has_variant or unit.fan_in_fan_out or unit.lora_bias[ADAPTER_NAME]:
        unit.merge()
        return
    # PEFT's product of whole factors takes twice the weight's memory: it gets a few rows of B at a time.
    factor, weight = unit.lora_B[ADAPTER_NAME], unit.get_base_layer().weight.data
    whole = factor.weight
    step = max(1, _PIECE_VALUES // weight.shape[1])
    for first in range(0, len(weight), step):
        factor.weight = nn.Parameter(whole.data[first : first + step], requires_grad=False)
        weight[first : first + step] += unit.get_delta_weight(ADAPTER_NAME)
    factor.weight = whole


def sum_norms_precisely(model: nn.Module) -> None:
    """Let PEFT's DoRA on embeddings add up norms over the vocabulary exactly enough to compare with.

    Its own float32 sums over the rows of a column one after the other: with 151,936 rows they were off by 1.3e-5.
    """
    from peft.tuners.lora.dora import DoraEmbeddingLayer

    for module in model.modules():
        if isinstance(module, DoraEmbeddingLayer):
            module.get_weight_norm = _find_norms


def _find_norms(
    weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
) -> torch.Tensor:
    # PEFT gives the update transposed, one row for each value of an embedding.
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    step = max(1, _PIECE_VALUES // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = weight[first : first + step] + scaling * lora_weight[:, first : first + step].T
        squares += rows.double().square().sum(dim=0)
    return squares.sqrt().to(weight.dtype)
