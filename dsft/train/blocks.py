"""The blocks of a model under training, on either path: whose LoRA weights the optimizer steps, and what recomputes."""

from typing import Any, Protocol

from dsft.core.engine.flat_lora import FlatLora
from dsft.core.engine.install import install_engine
from dsft.core.models.attention import AttentionKernel
from dsft.core.models.device import Precision, torch_dtype
from dsft.core.models.load import recompute_blocks


class Blocks(Protocol):
    """What the trainer asks of a model's blocks."""

    @property
    def fuses_loss(self) -> bool:
        """Whether the engine's kernel computes the loss."""

    @property
    def lora(self) -> FlatLora:
        """LoRA's weights and gradients."""

    def recompute(self, num_blocks: int) -> None:
        """Let the first `num_blocks` blocks recompute their activations in the backward pass."""

    def remove(self) -> None:
        """Give the model its own modules back."""


class PlainBlocks:
    """transformers' and PEFT's own modules.

    Args:
        model: A PEFT model.
    """

    fuses_loss = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.lora = FlatLora.each_alone(model.parameters())

    def recompute(self, num_blocks: int) -> None:
        """Let the first `num_blocks` blocks recompute their activations in the backward pass."""
        recompute_blocks(self._model, num_blocks)

    def remove(self) -> None:
        """Change nothing: the modules are the model's own."""


def take_blocks(model: Any, *, uses_engine: bool, attention: AttentionKernel, precision: Precision) -> Blocks:
    """Return the blocks of a PEFT model, computed by the engine or as they are."""
    if uses_engine:
        return install_engine(model, attention.name, torch_dtype(precision))
    return PlainBlocks(model)
