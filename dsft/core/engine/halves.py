"""The two halves of a Llama block, attention and MLP, forward and backward, keeping what no product has to make again.

Kept for the backward pass are, for a token: the input of each half, queries, keys and values as attention takes them,
its output, gate and up, and every layer's product with A. Norms, the gating and the input of `down` are computed again
from those; they are elementwise. Frozen weights have no gradient, so there is nothing else to keep.

The gradient of the residual stream lives in a buffer with columns to spare behind each row, which take the product of a
gradient with B: with them one matrix product gives the gradient at a layer's input, LoRA's part included.
"""

from dataclasses import dataclass

import torch

from dsft.core.engine import elementwise
from dsft.core.engine.attention import SavedAttention, attend
from dsft.core.engine.projection import Projection
from dsft.core.models.attention import AttentionName


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: its frozen weight [width], and what is added to the mean of squares."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Stream:
    """What all blocks of a pass share about the stream of tokens.

    Attributes:
        cosines: [tokens, head_dim / 2].
        sines: [tokens, head_dim / 2].
        bounds: Where each sample begins and ends, int32 [samples + 1].
        longest: Tokens of the longest sample.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    bounds: torch.Tensor
    longest: int


@dataclass
class SavedAttentionHalf:
    """What the attention half keeps: input, 1 / root mean square, products with A, attention, heads before norms."""

    states: torch.Tensor
    rstd: torch.Tensor
    low: torch.Tensor
    attention: SavedAttention
    output_low: torch.Tensor
    heads: torch.Tensor | None
    head_rstd: tuple[torch.Tensor, torch.Tensor] | None


@dataclass
class SavedMlpHalf:
    """What the MLP half keeps: input, 1 / root mean square, products with A, gate and up."""

    states: torch.Tensor
    rstd: torch.Tensor
    low: torch.Tensor
    gate_up: torch.Tensor
    output_low: torch.Tensor


@dataclass(frozen=True)
class AttentionHalf:
    """x + O(attention(Q, K, V of norm(x))).

    Attributes:
        norm: Before attention.
        inputs: Queries, keys and values.
        output: The layer behind attention.
        head_norms: Of each query and each key head (Qwen 3); None where there are none.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Values of a head.
        scaling: Factor of the scores.
        kernel: The attention kernel.
    """

    norm: Norm
    inputs: Projection
    output: Projection
    head_norms: tuple[Norm, Norm] | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    kernel: AttentionName

    def forward(self, states: torch.Tensor, stream: Stream) -> tuple[torch.Tensor, SavedAttentionHalf]:
        """Return the sum [tokens, hidden] and what `backward` needs.

        Args:
            states: The residual stream, [tokens, hidden].
            stream: What the blocks share.
        """
        extended, rstd, low = _normalize_and_lower(states, self.norm, self.inputs)
        heads = _multiply(extended, self.inputs).view(len(states), -1, self.head_dim)
        del extended
        queries, keys, values, head_rstd = self._rotate(heads, stream)
        saved = attend(self.kernel, queries, keys, values, stream.bounds, stream.longest, self.scaling)
        attended = saved.output.reshape(len(states), -1)
        output_low = self.output.lower(attended)
        result = torch.addmm(states, attended, self.output.dequantize().t())
        result.addmm_(output_low, self.output.factors_b.t())
        if self.output.bias is not None:
            result += self.output.bias
        kept_heads = heads if self.head_norms is not None else None
        return result, SavedAttentionHalf(states, rstd, low, saved, output_low, kept_heads, head_rstd)

    def backward(
        self, gradient: torch.Tensor, saved: SavedAttentionHalf, stream: Stream, *, reaches_input: bool
    ) -> None:
        """Turn the gradient at the sum into that at the residual stream, and add to LoRA's.

        Args:
            gradient: [tokens, hidden + columns to spare]; changed.
            saved: From `forward`.
            stream: What the blocks share.
            reaches_input: Whether the gradient at the residual stream is needed; the first block's is not.
        """
        tokens = len(gradient)
        attended = saved.attention.output.reshape(tokens, -1)
        at_attention = _reverse_output(gradient, self.output, saved.output_low, attended)
        at_heads = self._reverse_attention(at_attention, saved, stream)
        del at_attention, attended
        low_gradient = at_heads[:, self.inputs.num_outputs :]
        inner = at_heads[:, : self.inputs.num_outputs]
        self.inputs.lower_gradient(inner, low_gradient)
        self.inputs.accumulate_b(inner, saved.low)
        if reaches_input:
            normalized = _reverse_norm(at_heads, gradient, saved.states, saved.rstd, self.norm, self.inputs)
        else:
            normalized = torch.empty_like(saved.states)
            elementwise.normalize(saved.states, self.norm.weight, self.norm.eps, normalized)
        self.inputs.accumulate_a(low_gradient, normalized)

    def _rotate(
        self, heads: torch.Tensor, stream: Stream
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return rotated queries, rotated keys and values; without norms of heads they stay where they are."""
        first, second = self.num_heads, self.num_heads + self.num_kv_heads
        values = heads[:, second:]
        if self.head_norms is None:
            turned = heads[:, :second]
            elementwise.rotate(turned, stream.cosines, stream.sines, turned)
            return heads[:, :first], heads[:, first:second], values, None
        turned = heads.new_empty(len(heads), second, self.head_dim)
        rstd = tuple(
            elementwise.normalize(heads[:, part], norm.weight, norm.eps, turned[:, part])
            for part, norm in zip((slice(first), slice(first, second)), self.head_norms, strict=True)
        )
        elementwise.rotate(turned, stream.cosines, stream.sines, turned)
        return turned[:, :first], turned[:, first:], values, (rstd[0], rstd[1])

    def _reverse_attention(self, gradient: torch.Tensor, saved: SavedAttentionHalf, stream: Stream) -> torch.Tensor:
        """Return the gradient at the products of q, k and v side by side, with columns to spare for those with B."""
        tokens, first, second = len(gradient), self.num_heads, self.num_heads + self.num_kv_heads
        at_queries, at_keys, at_values = saved.attention.reverse(gradient.view(tokens, first, self.head_dim))
        extended = gradient.new_empty(tokens, self.inputs.num_outputs + self.inputs.low_width)
        heads = extended[:, : self.inputs.num_outputs].view(tokens, -1, self.head_dim)
        elementwise.rotate_back(at_queries, at_keys, at_values, stream.cosines, stream.sines, heads)
        if self.head_norms is not None and saved.heads is not None and saved.head_rstd is not None:
            parts = (slice(first), slice(first, second))
            for part, norm, rstd in zip(parts, self.head_norms, saved.head_rstd, strict=True):
                at_part = heads[:, part]
                elementwise.normalize_backward(at_part, saved.heads[:, part], norm.weight, rstd, at_part, adds=False)
        return extended


@dataclass(frozen=True)
class MlpHalf:
    """x + down(silu(gate) * up), of norm(x).

    Attributes:
        norm: Before the MLP.
        inputs: Gate and up.
        output: Down.
    """

    norm: Norm
    inputs: Projection
    output: Projection

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, SavedMlpHalf]:
        """Return the sum [tokens, hidden] and what `backward` needs.

        Args:
            states: The residual stream, [tokens, hidden].
        """
        extended, rstd, low = _normalize_and_lower(states, self.norm, self.inputs)
        gate_up = _multiply(extended, self.inputs)
        del extended
        width = self.output.num_inputs
        gated = gate_up.new_empty(len(states), width + self.output.low_width)
        elementwise.gate(gate_up, gated[:, :width])
        output_low = self.output.lower(gated[:, :width])
        gated[:, width:].copy_(output_low)
        result = torch.addmm(states, gated, self.output.extend_forward().t())
        if self.output.bias is not None:
            result += self.output.bias
        return result, SavedMlpHalf(states, rstd, low, gate_up, output_low)

    def backward(self, gradient: torch.Tensor, saved: SavedMlpHalf) -> None:
        """Turn the gradient at the sum into that at the residual stream, and add to LoRA's.

        Args:
            gradient: [tokens, hidden + columns to spare]; changed.
            saved: From `forward`.
        """
        hidden = self.output.num_outputs
        outward, low_gradient = gradient[:, :hidden], gradient[:, hidden : hidden + self.output.low_width]
        self.output.lower_gradient(outward, low_gradient)
        self.output.accumulate_b(outward, saved.output_low)
        at_gated = torch.mm(gradient[:, : hidden + self.output.low_width], self.output.extend_backward())
        extended = gradient.new_empty(len(gradient), self.inputs.num_outputs + self.inputs.low_width)
        inner = extended[:, : self.inputs.num_outputs]
        elementwise.gate_backward(saved.gate_up, at_gated, inner, at_gated)
        self.output.accumulate_a(low_gradient, at_gated)
        del at_gated
        low_gradient = extended[:, self.inputs.num_outputs :]
        self.inputs.lower_gradient(inner, low_gradient)
        self.inputs.accumulate_b(inner, saved.low)
        normalized = _reverse_norm(extended, gradient, saved.states, saved.rstd, self.norm, self.inputs)
        self.inputs.accumulate_a(low_gradient, normalized)


def _normalize_and_lower(
    states: torch.Tensor, norm: Norm, inputs: Projection
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return [norm(x) | s A norm(x)], 1 / root mean square of x, and s A norm(x) in memory of its own."""
    extended = states.new_empty(len(states), inputs.num_inputs + inputs.low_width)
    normalized = extended[:, : inputs.num_inputs]
    rstd = elementwise.normalize(states, norm.weight, norm.eps, normalized)
    low = inputs.lower(normalized)
    extended[:, inputs.num_inputs :].copy_(low)
    return extended, rstd, low


def _multiply(extended: torch.Tensor, layers: Projection) -> torch.Tensor:
    weight = layers.extend_forward().t()
    return torch.mm(extended, weight) if layers.bias is None else torch.addmm(layers.bias, extended, weight)


def _reverse_output(gradient: torch.Tensor, layer: Projection, low: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return the gradient at the input of a half's last layer, and add to the gradients of its A and B."""
    width = layer.num_outputs + layer.low_width
    outward, low_gradient = gradient[:, : layer.num_outputs], gradient[:, layer.num_outputs : width]
    layer.lower_gradient(outward, low_gradient)
    layer.accumulate_b(outward, low)
    layer.accumulate_a(low_gradient, states)
    return torch.mm(gradient[:, :width], layer.extend_backward())


def _reverse_norm(
    extended: torch.Tensor,
    gradient: torch.Tensor,
    states: torch.Tensor,
    rstd: torch.Tensor,
    norm: Norm,
    inputs: Projection,
) -> torch.Tensor:
    """Add to the residual stream's gradient what comes through a half's first layers and its norm; return norm(x)."""
    buffer = torch.mm(extended, inputs.extend_backward())
    stream = gradient[:, : inputs.num_inputs]
    # norm(x) takes the place of the gradient at it, row by row.
    elementwise.normalize_backward(buffer, states, norm.weight, rstd, stream, adds=True, normalized=buffer)
    return buffer
