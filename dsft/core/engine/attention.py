"""Attention over a flat stream of samples, forward and backward, by the kernel that was chosen for the run."""

import inspect
import itertools
from functools import cache
from typing import Any

import torch

from dsft.core.models.attention import PER_SAMPLE, VARLEN, AttentionName

_CUDNN_LENGTHS = 128
"""cuDNN is taken for samples of a multiple of so many tokens."""


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

    if _is_for_cudnn(queries, keys, bounds, longest):
        return _attend_dense(queries, keys, values, longest, scaling)
    # Typed as Any because the signature differs between the versions of torch that are supported.
    varlen_attn: Any = varlen.varlen_attn
    options = _varlen_options()
    output: torch.Tensor = varlen_attn(
        queries, keys, values, bounds, bounds, longest, longest, scale=scaling, **options
    )
    return output


def _is_for_cudnn(queries: torch.Tensor, keys: torch.Tensor, bounds: torch.Tensor, longest: int) -> bool:
    """Return whether samples are equally long and of a length that comes again: cuDNN makes a plan for each shape."""
    is_dense = longest * (len(bounds) - 1) == len(queries) and longest % _CUDNN_LENGTHS == 0
    return is_dense and queries.shape == keys.shape and _has_fast_cudnn(queries.device)


@cache
def _has_fast_cudnn(device: torch.device) -> bool:
    # On Hopper its kernel is twice as fast as FlashAttention 2; on other cards that was not measured.
    return torch.cuda.get_device_capability(device) == (9, 0) and torch.backends.cudnn.enabled


def _attend_dense(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    # [samples * longest, heads, head_dim] -> [samples, heads, longest, head_dim]
    dense = [states.view(-1, longest, *states.shape[1:]).transpose(1, 2) for states in (queries, keys, values)]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        output = scaled_dot_product_attention(dense[0], dense[1], dense[2], is_causal=True, scale=scaling)
    return output.transpose(1, 2).reshape(queries.shape)


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
