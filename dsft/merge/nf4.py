"""The NF4 round trip of a weight: what training computed with instead of the weight itself."""

from typing import TYPE_CHECKING

from dsft.core.host_memory import return_freed_memory

if TYPE_CHECKING:
    import torch


def round_to_nf4(weight: "torch.Tensor", compute_dtype: "torch.dtype") -> "torch.Tensor":
    """Quantize a weight as training does and return what it dequantizes to.

    NF4 in blocks of 64 with double quantization (QLoRA, arXiv:2305.14314, section 3). The scales' common offset is
    a mean over the whole tensor, so the tensor can't be taken in pieces.

    Args:
        weight: A whole weight of a linear layer, in any float type.
        compute_dtype: The type training computed in: the weight was loaded in it, and dequantized into it.

    Returns:
        The weight in `compute_dtype`, same shape.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    loaded = weight.to(compute_dtype)
    del weight  # a caller that has handed it over holds it no longer
    codes, state = quantize_4bit(loaded, blocksize=64, compress_statistics=True, quant_type="nf4")
    del loaded
    rounded: torch.Tensor = dequantize_4bit(codes, state)
    del codes, state
    return_freed_memory()  # of what the quantization of a whole weight took, too
    return rounded
