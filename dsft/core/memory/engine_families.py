"""Which models dsft's engine computes exactly, told from config.json and settings alone."""

from collections.abc import Mapping
from typing import Any

from dsft.core.memory.model_shape import NF4_BLOCK

ENGINE_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""`model_type`s whose block is norm, attention, norm, SwiGLU, as the engine computes it."""


def find_model_obstacle(config: Mapping[str, Any], *, lora_dropout: float, is_gpu: bool) -> str | None:
    """Return why the engine can't compute a model exactly, as a phrase that goes on after "because"; None if it can.

    Args:
        config: The model's config.json.
        lora_dropout: Dropout on the input of the LoRA branch.
        is_gpu: Whether it is computed by the engine's kernels.
    """
    family = config["model_type"]
    if family not in ENGINE_FAMILIES:
        return f"the engine does not know the blocks of the family {family}"
    if lora_dropout > 0:
        return "the engine has no dropout in LoRA"
    if config.get("hidden_act", "silu") != "silu":
        return f"the activation is {config['hidden_act']}, not silu"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        return "the model rotates a part of each head only"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if is_gpu and (head_dim & (head_dim - 1) or not 16 <= head_dim <= 256):
        return f"the engine's kernels take heads of 16, 32, 64, 128 or 256 values, not {head_dim}"
    widths = (config["hidden_size"], config["intermediate_size"], head_dim * config["num_attention_heads"])
    odd = [width for width in widths if width % NF4_BLOCK]
    if odd:
        return f"the engine's layers take multiples of {NF4_BLOCK} values, not {odd[0]}"
    return None
