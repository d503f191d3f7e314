"""Attention over a flat stream of samples that never see each other, and the choice of its kernel.

A micro-batch is one row of tokens, samples one after the other, with the cumulative lengths `cu_seq_lens_q` passed to
the model's forward (the keyword transformers uses for padding-free batches). Three kernels understand it: the
flash-attn package, PyTorch's own variable-length flash kernel, and scaled_dot_product_attention sample by sample.
"""

import importlib.util
import inspect
import itertools
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

from dsft.core.errors import ConfigError
from dsft.core.models.device import Device, Precision

if TYPE_CHECKING:
    import torch

VARLEN: Final = "dsft_varlen"
PER_SAMPLE: Final = "dsft_per_sample"

AttentionName = Literal["flash_attention_2", "dsft_varlen", "dsft_per_sample"]


@dataclass(frozen=True)
class AttentionKernel:
    """The chosen attention.

    Attributes:
        name: The name transformers knows it by.
        description: One phrase for the summary.
        notice: A sentence the user should read, where the choice is not what was asked for.
    """

    name: AttentionName
    description: str
    notice: str | None = None


def choose_attention(demanded_by: str | None, device: Device, precision: Precision) -> AttentionKernel:
    """Choose the attention kernel before the model loads.

    Args:
        demanded_by: What demands a flash kernel ("--use-flash-attention", "preset quality"); None if nothing does.
        device: Where the model computes.
        precision: Its compute type; flash kernels take 16-bit types only.

    Raises:
        ConfigError: A flash kernel is demanded and there is none for this device and type.
    """
    obstacle = _flash_obstacle(device, precision)
    if obstacle is not None:
        if demanded_by is not None:
            raise ConfigError(
                f"use_flash_attention: a flash kernel is demanded ({demanded_by}), but {obstacle}.",
                "Take --no-use-flash-attention: the built-in attention gives the same result.",
            )
        return AttentionKernel(PER_SAMPLE, "PyTorch scaled_dot_product_attention, sample by sample")
    if demanded_by is None:
        return AttentionKernel(VARLEN, "PyTorch variable-length flash kernel")
    problem = _flash_attn_problem()
    if problem is None:
        return AttentionKernel("flash_attention_2", "FlashAttention 2 (flash-attn package)")
    return AttentionKernel(
        VARLEN,
        "FlashAttention 2 (PyTorch's built-in kernel)",
        f"The flash-attn package {problem}; PyTorch's built-in flash kernel is used instead.",
    )


def register_attention() -> None:
    """Make both own kernels known to transformers under their names; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(PER_SAMPLE, attend_per_sample)
    AttentionInterface.register(VARLEN, attend_varlen)


def attend_per_sample(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> "tuple[torch.Tensor, None]":
    """Causal attention, one call of scaled_dot_product_attention for each sample.

    Args:
        module: The attention layer; names the grouping of its key and value heads.
        query: Rotated queries, [1, num_heads, num_tokens, head_dim].
        key: Rotated keys, [1, num_kv_heads, num_tokens, head_dim].
        value: Values, as the keys.
        attention_mask: Always None here: transformers makes no mask for kernels it doesn't know.
        scaling: Factor of the scores; None is 1/sqrt(head_dim).
        dropout: Dropout on the attention weights.
        kwargs: Holds `cu_seq_lens_q`, int32 [num_samples + 1]: where each sample begins and ends.

    Returns:
        [1, num_tokens, num_heads, head_dim], and None for the weights.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    bounds: list[int] = kwargs["cu_seq_lens_q"].tolist()
    key, value = _repeat_heads(query, key, value)
    outputs = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
        )
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def attend_varlen(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> "tuple[torch.Tensor, None]":
    """Causal attention over all samples in one call of PyTorch's variable-length flash kernel.

    Args and Returns as `attend_per_sample`; kwargs also holds `max_length_q`, the longest sample's length.
    """
    from torch.nn.attention import varlen

    # Typed as Any because the signature differs between the versions of torch that are supported.
    varlen_attn: Any = varlen.varlen_attn
    key, value = _repeat_heads(query, key, value)
    bounds, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    # [1, heads, tokens, head_dim] -> [tokens, heads, head_dim], the kernel's layout
    streams = [states.squeeze(0).transpose(0, 1) for states in (query, key, value)]
    output = varlen_attn(*streams, bounds, bounds, longest, longest, scale=scaling, **_causal_arguments())
    return output.unsqueeze(0), None


def _repeat_heads(
    query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Give each query head a key and a value head of its own: not every kernel takes fewer of them.

    PyTorch's memory-efficient kernel, for one, does not, and the fallback keeps the whole matrix of scores.
    """
    num_groups = query.shape[1] // key.shape[1]
    if num_groups == 1:
        return key, value
    return key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)


@cache
def _causal_arguments() -> dict[str, Any]:
    # torch 2.10 has the flag is_causal; later versions express it as a window without right context.
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}


def _flash_obstacle(device: Device, precision: Precision) -> str | None:
    if device.kind != "cuda":
        return "a CPU has no flash-attention kernel"
    if device.capability is None or device.capability < (8, 0):
        return f"{device.name} is older than Ampere (compute capability 8.0), which flash kernels need"
    if precision == "fp32":
        return "flash kernels compute in 16-bit types and the precision is fp32"
    return None


def _flash_attn_problem() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "is not installed"
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:  # an extension built for another torch fails at import
        return f"is installed but broken ({str(error).partition(chr(10))[0]})"
    return None
