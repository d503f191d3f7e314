"""Float32 weights into the bytes of a GGUF tensor, rounded once; and the bytes that takes."""

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from dsft.core.errors import DsftError

if TYPE_CHECKING:
    import torch

Rounding = Literal["f32", "f16", "q8_0"]

Q8_BLOCK = 32
"""Weights that share a scale in q8_0: a float16 and 32 bytes (`block_q8_0` in ggml)."""

_Q8_BLOCK_BYTES = 2 + Q8_BLOCK


def rounded_bytes(shape: tuple[int, ...], rounding: Rounding) -> int:
    """Return the bytes of a tensor."""
    num_weights = math.prod(shape)
    if rounding == "q8_0":
        return num_weights // Q8_BLOCK * _Q8_BLOCK_BYTES
    return num_weights * (2 if rounding == "f16" else 4)


def round_rows(
    rows: "torch.Tensor", rounding: Rounding, name: str
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Round whole rows.

    Args:
        rows: Rows of a tensor in float32, on the CPU.
        rounding: What they become; for q8_0 a row is a multiple of 32 weights.
        name: The tensor's name, for the message.

    Returns:
        Their bytes, in one dimension.

    Raises:
        DsftError: A weight is NaN or infinite, or too large for the type.
    """
    # PyTorch is some ten times faster than NumPy at making float16, and no faster than `gguf` at q8_0.
    if rounding == "q8_0":
        data = _round_q8_0(rows.numpy())
        is_finite = _is_finite_float16(data.reshape(-1, _Q8_BLOCK_BYTES)[:, :2].copy())
    elif rounding == "f16":
        data = rows.half().contiguous().numpy().reshape(-1).view(np.uint8)
        is_finite = _is_finite_float16(data)
    else:
        data = rows.float().contiguous().numpy().reshape(-1).view(np.uint8)
        is_finite = bool(np.isfinite(data.view(np.float32)).all())
    if not is_finite:
        raise DsftError(
            f"{name} holds a weight that is NaN, infinite or too large for {rounding}, so no GGUF was written.",
            "Merge without a GGUF file, and look at the adapter.",
        )
    return data.reshape(-1)


def _round_q8_0(
    rows: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    from gguf import GGMLQuantizationType, quants

    # A block of nothing but denormal weights has a scale of 0 whatever becomes of them; one with NaN, infinite or too
    # large weights has a scale that is not finite, which is refused above.
    with np.errstate(over="ignore", invalid="ignore"):
        return quants.quantize(np.ascontiguousarray(rows), GGMLQuantizationType.Q8_0)


def _is_finite_float16(data: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bool:
    """Return whether no float16 has all bits of its exponent set; twenty times faster than NumPy's isfinite."""
    return int((data.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7C00
