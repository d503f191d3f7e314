"""What the engine computes exactly, told from configuration and settings before a model is loaded."""

from collections.abc import Mapping
from typing import Any

from dsft.core.errors import take_first_line
from dsft.core.memory.engine_families import find_model_obstacle
from dsft.core.models.device import Device
from dsft.core.notices import Notify
from dsft.core.triton_cache import place_triton_cache


def find_obstacle(config: Mapping[str, Any], *, lora_dropout: float, device: Device, on_notice: Notify) -> str | None:
    """Return why the engine can't compute a run exactly, as a phrase that goes on after "because"; None if it can.

    Args:
        config: The model's config.json.
        lora_dropout: Dropout on the input of the LoRA branch.
        device: Where the run computes; on a GPU the kernels are tried, which opens its CUDA context.
        on_notice: Receives where compiled kernels can't be kept.
    """
    is_gpu = device.kind == "cuda"
    obstacle = find_model_obstacle(config, lora_dropout=lora_dropout, is_gpu=is_gpu)
    return _find_kernel_obstacle(on_notice) if obstacle is None and is_gpu else obstacle


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
