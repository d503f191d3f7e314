"""Attention over a flat stream of samples, forward and backward, by the kernel that was chosen for the run."""

import itertools
from functools import cache
from typing import Any, Protocol

import torch

from dsft.core.models.attention import PER_SAMPLE, AttentionName

_CUDNN_LENGTHS = 128
"""cuDNN is taken for samples of a multiple of so many tokens."""


class SavedAttention(Protocol):
    """A finished forward pass, from which gradients are computed once."""

    @property
    def output(self) -> torch.Tensor:
        """The attention's output, [tokens, num_heads, head_dim]."""

    def reverse(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients at queries, keys and values, each like its input.

        Args:
            gradient: At the output, [tokens, num_heads, head_dim].
        """


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
    if name == PER_SAMPLE:
        return _SavedGraph.run(_attend_per_sample, queries, keys, values, bounds, scaling)
    if name == "flash_attention_2":
        return _SavedGraph.run(_attend_by_package, queries, keys, values, bounds, longest, scaling)
    if _is_for_cudnn(queries, keys, bounds, longest):
        return _SavedGraph.run(_attend_dense, queries, keys, values, longest, scaling)
    return _SavedVarlen(queries, keys, values, bounds, longest, scaling)


class _SavedGraph:
    """Attention by any function that autograd can reverse.

    Args:
        output: With the graph of how it came about.
        inputs: Queries, keys and values, the leaves of that graph.
    """

    def __init__(self, output: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        self._output = output
        self._inputs = inputs

    @classmethod
    def run(
        cls, function: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *others: Any
    ) -> "_SavedGraph":
        inputs = tuple(states.detach().requires_grad_() for states in (queries, keys, values))
        with torch.enable_grad():
            return cls(function(*inputs, *others), inputs)

    @property
    def output(self) -> torch.Tensor:
        return self._output.detach()

    def reverse(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self._output, self._inputs, gradient)


class _SavedVarlen:
    """Attention by PyTorch's own variable-length flash kernel.

    Called below `torch.nn.attention.varlen`, whose dispatch in Python takes the host several times as long as all else
    that a launch needs; it gives keys fewer heads than queries as they are.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        scaling: float,
    ) -> None:
        self._inputs = (queries, keys, values)
        self._stream = (bounds, bounds, longest, longest, 0.0, True)  # no dropout, causal
        self._scaling = scaling
        self.output, self._log_sums, self._random_state, self._unused, _ = torch.ops.aten._flash_attention_forward(
            *self._inputs, *self._stream, False, scale=scaling
        )

    def reverse(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradients: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_backward(
            gradient, *self._inputs, self.output, self._log_sums, *self._stream, self._random_state, self._unused,
            scale=self._scaling,
        )  # fmt: skip
        del self._log_sums
        return gradients


def try_flash(dtype: torch.dtype) -> None:
    """Run PyTorch's flash kernel forward and backward on 16 tokens of the first GPU.

    Raises:
        Exception: This version of PyTorch has it in another form.
    """
    states = torch.ones(16, 1, 64, dtype=dtype, device="cuda")
    bounds = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
    _SavedVarlen(states, states, states, bounds, 16, 0.125).reverse(states)


def _is_for_cudnn(queries: torch.Tensor, keys: torch.Tensor, bounds: torch.Tensor, longest: int) -> bool:
    """Return whether samples are equally long and of a length that comes again: cuDNN makes a plan for each shape."""
    is_dense = longest * (len(bounds) - 1) == len(queries) and longest % _CUDNN_LENGTHS == 0
    return queries.is_cuda and is_dense and queries.shape == keys.shape and _has_fast_cudnn(queries.device)


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


def _attend_by_package(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bounds: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(
        queries, keys, values, bounds, bounds, longest, longest, softmax_scale=scaling, causal=True
    )
    return output


def _attend_per_sample(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bounds: torch.Tensor, scaling: float
) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:  # not every kernel takes fewer key heads than query heads
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    # [tokens, heads, head_dim] -> [1, heads, tokens, head_dim]: without the first, PyTorch keeps all scores
    queries, keys, values = (states.transpose(0, 1).unsqueeze(0) for states in (queries, keys, values))
    outputs = [
        scaled_dot_product_attention(
            queries[:, :, start:end], keys[:, :, start:end], values[:, :, start:end], is_causal=True, scale=scaling
        )
        for start, end in itertools.pairwise(bounds.tolist())
    ]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)
