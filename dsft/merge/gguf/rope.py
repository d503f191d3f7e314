"""Rotary embeddings as llama.cpp is told of them; only the kinds it computes exactly as transformers does."""

import math
from dataclasses import dataclass
from typing import Any

from dsft.core.errors import ModelError


@dataclass(frozen=True)
class GgufRope:
    """How positions are rotated.

    Attributes:
        frequency_base: Base of the frequencies (theta).
        linear_factor: Positions are divided by this; None where they aren't.
        divisors: What each frequency is divided by, for each pair of a head; None where all stay.
    """

    frequency_base: float
    linear_factor: float | None = None
    divisors: tuple[float, ...] | None = None


def rope_type(model_config: dict[str, Any]) -> str:
    """Return the kind of scaling in config.json, in its older or its newer form."""
    parameters = model_config.get("rope_parameters") or model_config.get("rope_scaling") or {}
    return str(parameters.get("rope_type") or parameters.get("type") or "default") if parameters else "default"


def read_rope(parameters: dict[str, Any], head_dim: int, has_divisors: bool) -> GgufRope:
    """Read the rotary embedding.

    Args:
        parameters: What transformers makes of config.json: `rope_type`, `rope_theta` and what the kind needs.
        head_dim: Values of a head.
        has_divisors: Whether llama.cpp reads divisors for this architecture.

    Raises:
        ModelError: llama.cpp can't rotate like this.
    """
    kind = parameters["rope_type"]
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("Only a part of each head is rotated (partial_rotary_factor), which dsft writes no GGUF of.")
    base = float(parameters["rope_theta"])
    if kind in {"default", "none"}:
        return GgufRope(base)
    if kind == "linear":
        return GgufRope(base, linear_factor=float(parameters["factor"]))
    if kind == "llama3" and has_divisors:
        return GgufRope(base, divisors=_llama3_divisors(parameters, base, head_dim))
    raise ModelError(
        f"The model scales its rotary embedding by the rule {kind!r}, which llama.cpp does not compute as transformers "
        "does for this architecture.",
        "Merge without a GGUF file.",
    )


def _llama3_divisors(parameters: dict[str, Any], base: float, head_dim: int) -> tuple[float, ...]:
    """Slow rotations are divided by the factor, fast ones stay, those between go over smoothly (Llama 3.1)."""
    factor, context = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])

    def divisor(pair: int) -> float:
        turns = context / (2 * math.pi * math.pow(base, 2 * pair / head_dim))
        if turns < low:
            return factor
        if turns > high:
            return 1.0
        share = (turns - low) / (high - low)
        return 1 / ((1 - share) / factor + share)

    return tuple(divisor(pair) for pair in range(head_dim // 2))
