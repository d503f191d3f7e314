"""What the engine computes exactly, told from configuration and settings before a model is loaded."""

from collections.abc import Mapping
from typing import Any

from dsft.core.errors import take_first_line
from dsft.core.models.device import Device
from dsft.core.notices import Notify
from dsft.core.triton_cache import place_triton_cache

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""`model_type`s whose block is norm, attention, norm, SwiGLU, as the engine computes it."""


def find_obstacle(config: Mapping[str, Any], *, lora_dropout: float, device: Device, on_notice: Notify) -> str | None:
    """Return why the engine can't compute a run exactly, as a phrase that goes on after "because"; None if it can.

    Args:
        config: The model's config.json.
        lora_dropout: Dropout on the input of the LoRA branch.
        device: Where the run computes; on a GPU the kernels are tried, which opens its CUDA context.
        on_notice: Receives where compiled kernels can't be kept.
    """
    family = config["model_type"]
    if family not in FAMILIES:
        return f"it does not know the blocks of the family {family}"
    if lora_dropout > 0:
        return "it has no dropout in LoRA"
    if config.get("hidden_act", "silu") != "silu":
        return f"the activation is {config['hidden_act']}, not silu"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        return "the model rotates a part of each head only"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if device.kind == "cuda":
        if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
            return f"its kernels take heads of 16, 32, 64, 128 or 256 values, not {head_dim}"
        return _find_kernel_obstacle(on_notice)
    return None


def _find_kernel_obstacle(on_notice: Notify) -> str | None:
    try:
        place_triton_cache(on_notice)
        import torch

        from dsft.core.engine import elementwise

        states = torch.ones(1, 16, dtype=torch.float32, device="cuda")
        # Triton needs a C compiler and Python's headers; that they are missing shows only here.
        elementwise.normalize(states, states[0], 1e-6, torch.empty_like(states))
    except Exception as error:
        return f"its kernels can't be compiled ({type(error).__name__}: {take_first_line(error)})"
    return None
