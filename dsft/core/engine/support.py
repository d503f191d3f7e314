"""What the engine computes exactly, told from configuration and settings before a model is loaded."""

from collections.abc import Mapping
from typing import Any

from dsft.core.errors import is_out_of_memory, take_first_line
from dsft.core.memory.engine_families import find_model_obstacle
from dsft.core.models.device import Device, Precision, torch_dtype
from dsft.core.notices import Notify
from dsft.core.triton_cache import place_triton_cache


def find_obstacle(
    config: Mapping[str, Any], *, lora_dropout: float, device: Device, precision: Precision, on_notice: Notify
) -> str | None:
    """Return why the engine can't compute a run exactly, as a phrase that goes on after "because"; None if it can.

    Args:
        config: The model's config.json.
        lora_dropout: Dropout on the input of the LoRA branch.
        device: Where the run computes; on a GPU the kernels are tried, which opens its CUDA context.
        precision: Compute type.
        on_notice: Receives why a model that the engine knows is not computed by it, and that compiled kernels can't be
            kept.
    """
    is_gpu = device.kind == "cuda"
    obstacle = find_model_obstacle(config, lora_dropout=lora_dropout, is_gpu=is_gpu)
    if obstacle is not None or not is_gpu:
        return obstacle
    obstacle = _find_kernel_obstacle(precision, on_notice)
    if obstacle is not None:
        on_notice(f"dsft's engine is not used, which is much slower, because {obstacle}.")
    return obstacle


def _find_kernel_obstacle(precision: Precision, on_notice: Notify) -> str | None:
    try:
        place_triton_cache(on_notice)
        _try_kernels(precision)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"the engine's kernels do not work here ({type(error).__name__}: {take_first_line(error)})"
    return None


def _try_kernels(precision: Precision) -> None:
    """Run, on a few values, what depends on the installation: Triton's compiler, and PyTorch's unpublished operations.

    Triton needs a C compiler and Python's headers; that they are missing shows only here.
    """
    import torch

    from dsft.core.engine import elementwise
    from dsft.core.engine.attention import try_flash
    from dsft.core.engine.projection import add_product

    dtype = torch_dtype(precision)
    states = torch.ones(16, 16, dtype=dtype, device="cuda")
    elementwise.normalize(states, states[0], 1e-6, torch.empty_like(states))
    add_product(torch.zeros(16, 16, device="cuda"), states, states)
    add_product(torch.zeros(2, 16, 16, device="cuda"), states.expand(2, 16, 16), states.expand(2, 16, 16))
    if precision != "fp32" and torch.cuda.get_device_capability() >= (8, 0):
        try_flash(dtype)
