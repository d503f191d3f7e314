"""Counts the bytes of tensors that are alive while code runs: what a GPU's allocator would have given out."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsft.core.memory.model_shape import in_blocks


class LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that makes them to the moment the last reference to them goes.

    What an operation takes for itself and gives back before it ends is not seen.

    Args:
        there: Tensors that exist already and are not counted: weights, tables.
    """

    def __init__(self, *there: torch.Tensor) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._there = there  # held, so that no new storage takes the place of one of them
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor from now on, if its storage isn't counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = in_blocks(storage.nbytes())
            self.live_bytes += self._sizes[key]
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key)

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.live_bytes

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def storages_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return a tensor of each storage that belongs to a model: weights, what quantization keeps, gradients, buffers."""
    tensors: list[torch.Tensor] = list(model.buffers())
    for parameter in model.parameters():
        tensors.append(parameter)
        if parameter.grad is not None:
            tensors.append(parameter.grad)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return tensors
