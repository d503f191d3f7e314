"""A Llama block computed by the engine, in the place of transformers' own module in one model."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dsft.core.engine import elementwise
from dsft.core.engine.halves import AttentionHalf, MlpHalf, Norm, SavedAttentionHalf, SavedMlpHalf, Stream


class EngineBlock(torch.nn.Module):
    """Takes a decoder layer's place and its children, under their names: names of weights stay what they were.

    Its backward pass adds LoRA's gradients to the flat gradients themselves; autograd sees the residual stream alone.

    Args:
        layer: transformers' decoder layer.
        attention: How its attention half is computed.
        mlp: How its MLP half is computed.

    Attributes:
        recomputes: Whether the backward pass runs the forward pass once more, and keeps the input alone until then.
    """

    def __init__(self, layer: torch.nn.Module, attention: AttentionHalf, mlp: MlpHalf) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.attention = attention
        self.mlp_half = mlp
        self.recomputes = False
        # Autograd calls the backward pass of a function only where one of its inputs is trained.
        # In a tuple, or the module would take it for a parameter of its own.
        self._trained = (next(parameter for parameter in self.parameters() if parameter.requires_grad),)
        self.train(layer.training)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        """Return the residual stream after the block.

        Args:
            hidden_states: [1, tokens, hidden].
            position_embeddings: Cosines and sines of the positions, [1, tokens, head_dim].
            kwargs: Holds `cu_seq_lens_q` and `max_length_q`, as for transformers' padding-free batches.
        """
        half = self.attention.head_dim // 2
        cosines, sines = (table[0, :, :half] for table in position_embeddings)
        stream = Stream(cosines, sines, kwargs["cu_seq_lens_q"], kwargs["max_length_q"])
        apply: Any = _RunBlock.apply
        result: torch.Tensor = apply(hidden_states.squeeze(0), *self._trained, self, stream)
        return result.unsqueeze(0)

    def run(self, states: torch.Tensor, stream: Stream) -> tuple[torch.Tensor, SavedAttentionHalf, SavedMlpHalf]:
        """Run both halves; see theirs."""
        middle, saved_attention = self.attention.forward(states, stream)
        result, saved_mlp = self.mlp_half.forward(middle)
        return result, saved_attention, saved_mlp

    @property
    def spare_columns(self) -> int:
        """Columns behind the residual stream's gradient that the halves' last layers need."""
        return max(self.attention.output.low_width, self.mlp_half.output.low_width)


class _RunBlock(torch.autograd.Function):
    """One block; keeps what its halves keep, or its input alone."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, _trained: torch.Tensor, block: EngineBlock, stream: Stream
    ) -> torch.Tensor:
        """Return the residual stream after the block, [tokens, hidden]."""
        states = states.contiguous()
        with torch.autocast(states.device.type, enabled=False):
            result, *saved = block.run(states, stream)
        ctx.block, ctx.stream = block, stream
        ctx.saved = (states, None) if block.recomputes else (states, saved)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outward: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        """Return the gradient at the residual stream before the block."""
        block, stream = ctx.block, ctx.stream
        states, saved = ctx.saved
        ctx.saved = None  # what the block kept goes as its backward pass needs it no more
        hidden = outward.shape[1]
        gradient = _with_spare_columns(outward, block.spare_columns)
        del outward
        with torch.autocast(gradient.device.type, enabled=False):
            if saved is None:
                _, *saved = block.run(states, stream)
            saved_attention, saved_mlp = saved
            del saved
            block.mlp_half.backward(gradient, saved_mlp)
            del saved_mlp
            block.attention.backward(gradient, saved_attention, stream, reaches_input=ctx.needs_input_grad[0])
        return gradient[:, :hidden] if ctx.needs_input_grad[0] else None, None, None, None


def _with_spare_columns(gradient: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Return a gradient with columns to spare behind each row; without a copy where the engine left it so.

    The blocks' gradients reach one another through autograd as the first columns of such a buffer.
    """
    tokens, hidden = gradient.shape
    row = hidden + num_columns
    num_values = gradient.untyped_storage().nbytes() // gradient.element_size() - gradient.storage_offset()
    if gradient.stride() == (row, 1) and num_values >= tokens * row:
        return gradient.as_strided((tokens, row), (row, 1))
    buffer = gradient.new_empty(tokens, row)
    buffer[:, :hidden].copy_(gradient)
    return buffer


class EngineNorm(torch.nn.Module):
    """The norm behind the last block, in the place of transformers' own.

    Args:
        norm: It, with a frozen weight.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self._norm = Norm(norm.weight, norm.variance_epsilon)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalized states, of the shape of the states."""
        apply: Any = _RunNorm.apply
        result: torch.Tensor = apply(hidden_states, self._norm)
        return result


class _RunNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, norm: Norm) -> torch.Tensor:
        result = torch.empty_like(states)
        rstd = elementwise.normalize(states, norm.weight, norm.eps, result)
        ctx.save_for_backward(states, rstd)
        ctx.norm = norm
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outward: torch.Tensor) -> tuple[torch.Tensor, None]:
        states, rstd = ctx.saved_tensors
        result = torch.empty_like(states)
        elementwise.normalize_backward(outward, states, ctx.norm.weight, rstd, result, adds=False)
        return result, None
