"""Attention over a flat stream of samples, forward and backward, by the kernel that was chosen for the run."""

import inspect
import itertools
from functools import cache
from typing import Any

import torch

from dsft.core.models.attention import PER_SAMPLE, VARLEN, AttentionName


class SavedAttention:
    """A finished forward pass, from which `reverse` computes gradients once.

    Args:
        output: [tokens, num_heads, head_dim], with the graph of how it came about.
        inputs: Queries, keys and values, the leaves of that graph.
    """

    def __init__(self, output: torch.Tensor, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self._output = output
        self._inputs = inputs

    @property
    def output(self) -> torch.Tensor:
        """The attention's output, without its graph."""
        return self._output.detach()

    def reverse(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients at queries, keys and values, each like its input.

        Args:
            gradient: At the output, [tokens, num_heads, head_dim].
        """
        return torch.autograd.grad(self._output, self._inputs, gradient)


def attend(
    name: AttentionName,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float,
) -> SavedAttention:
    """Attend causally within each sample (arXiv:2205.14135 on a GPU).

    Args:
        name: The kernel.
        queries: Rotated, [tokens, num_heads, head_dim].
        keys: Rotated, [tokens, num_kv_heads, head_dim].
        values: [tokens, num_kv_heads, head_dim].
        bounds: Where each sample begins and ends, int32 [samples + 1].
        longest: Tokens of the longest sample.
        scaling: Factor of the scores.
    """
    queries, keys, values = (states.detach().requires_grad_() for states in (queries, keys, values))
    with torch.enable_grad():
        output = _KERNELS[name](queries, keys, values, bounds, longest, scaling)
    return SavedAttention(output, (queries, keys, values))


def _attend_varlen(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bounds: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    from torch.nn.attention import varlen

    # Typed as Any because the signature differs between the versions of torch that are supported.
    varlen_attn: Any = varlen.varlen_attn
    options = _varlen_options()
    output: torch.Tensor = varlen_attn(
        queries, keys, values, bounds, bounds, longest, longest, scale=scaling, **options
    )
    return output


@cache
def _varlen_options() -> dict[str, Any]:
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    # torch 2.10 has the flag is_causal; later versions express it as a window without right context.
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    return options


def _attend_by_package(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bounds: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(
        queries, keys, values, bounds, bounds, longest, longest, softmax_scale=scaling, causal=True
    )
    return output


def _attend_per_sample(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bounds: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:  # not every kernel takes fewer key heads than query heads
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    # [tokens, heads, head_dim] -> [heads, tokens, head_dim]
    queries, keys, values = queries.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)
    outputs = [
        scaled_dot_product_attention(
            queries[:, start:end], keys[:, start:end], values[:, start:end], is_causal=True, scale=scaling
        )
        for start, end in itertools.pairwise(bounds.tolist())
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


_KERNELS: dict[str, Any] = {
    VARLEN: _attend_varlen,
    "flash_attention_2": _attend_by_package,
    PER_SAMPLE: _attend_per_sample,
}
