"""Running a model whose weights are not in memory: each module's are read when it runs, and let go after it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

ReadWeight = Callable[[str], "torch.Tensor"]
"""Returns a tensor of the model by its name, in float32, on the device the model runs on."""


def stream_weights(model: "nn.Module", read_weight: ReadWeight, device: "torch.device") -> None:
    """Let a model on the meta device read its weights as it runs.

    Args:
        model: The model; buffers that are computed are there, and move to the device.
        read_weight: Reads a tensor by the name it has in the model.
        device: Where it runs.
    """
    _move_buffers(model, device)
    for path, unit in find_units(model):
        unit.forward = partial(_run, unit, unit.forward, path, read_weight)


def stream_weights_twice(
    model: "nn.Module",
    read_weight: ReadWeight,
    device: "torch.device",
    num_samples: int,
    change: "Callable[[nn.Module], None]",
    restore: "Callable[[nn.Module], None]",
) -> None:
    """Let a model run the first half of its batch as it is, and the second half with its weights changed.

    Each weight is read once for both.

    Args:
        model: As for `stream_weights`.
        read_weight: As for `stream_weights`.
        device: As for `stream_weights`.
        num_samples: Samples in a half of the batch.
        change: Changes the loaded weights of a module in place.
        restore: Takes back what `change` has noted in the module itself.
    """
    _move_buffers(model, device)
    for path, unit in find_units(model):
        forward = partial(_run_halves, unit, unit.forward, num_samples, change, restore)
        unit.forward = partial(_run, unit, forward, path, read_weight)


def find_units(module: "nn.Module", path: str = "") -> "Iterator[tuple[str, nn.Module]]":
    """Yield the outermost modules that hold weights of their own or are PEFT's, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or any(tensor.is_meta for tensor in own):
        yield path, module
        return
    for name, child in module.named_children():
        yield from find_units(child, f"{path}.{name}" if path else name)


def _run(
    unit: "nn.Module", forward: Callable[..., Any], path: str, read_weight: ReadWeight, *args: Any, **kwargs: Any
) -> Any:
    loaded = _load(unit, path, read_weight)
    try:
        return forward(*args, **kwargs)
    finally:
        for holder, name, placeholder in loaded:
            holder[name] = placeholder


def _run_halves(
    unit: "nn.Module",
    forward: Callable[..., Any],
    num_samples: int,
    change: "Callable[[nn.Module], None]",
    restore: "Callable[[nn.Module], None]",
    *args: Any,
    **kwargs: Any,
) -> Any:
    (args_as_they_are, kwargs_as_they_are), (args_changed, kwargs_changed) = (
        (_take_half(half, args, num_samples), {name: _take_half(half, kwargs[name], num_samples) for name in kwargs})
        for half in (0, 1)
    )
    as_it_is = forward(*args_as_they_are, **kwargs_as_they_are)
    change(unit)
    try:
        changed = forward(*args_changed, **kwargs_changed)
    finally:
        restore(unit)
    return _join_halves(as_it_is, changed, num_samples)


def _take_half(half: int, value: Any, num_samples: int) -> Any:
    import torch

    if isinstance(value, tuple):
        return tuple(_take_half(half, each, num_samples) for each in value)
    # What is the same for every sample, such as positions, comes as a batch of one.
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 2 * num_samples:
        return value.chunk(2)[half]
    return value


def _join_halves(first: Any, second: Any, num_samples: int) -> Any:
    import torch

    if isinstance(first, tuple):
        return tuple(_join_halves(*each, num_samples) for each in zip(first, second, strict=True))
    if not isinstance(first, torch.Tensor):
        return first
    return torch.cat([each.expand(num_samples, *each.shape[1:]) for each in (first, second)])


def _load(
    unit: "nn.Module", path: str, read_weight: ReadWeight
) -> "list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]":
    from torch import nn

    loaded: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    for inner, module in unit.named_modules():
        if "original_module" in inner.split("."):
            continue  # PEFT keeps it beside the one that runs
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is None or not tensor.is_meta or name in module._non_persistent_buffers_set:
                    continue
                full = ".".join(part for part in (path, inner, name) if part)
                weight = read_weight(full)
                loaded.append((holder, name, tensor))
                holder[name] = nn.Parameter(weight, requires_grad=False) if isinstance(tensor, nn.Parameter) else weight
    return loaded


def _move_buffers(model: "nn.Module", device: "torch.device") -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
