"""One piece of memory for all gradients, there from the first step to the last."""

from collections.abc import Iterable

import torch

_ALIGNMENT_VALUES = 128


class GradientBuffer:
    """Float32 gradients of the trained weights, each a view of one tensor.

    Made before the first pass, it lies below the activations. Gradients made in the first backward pass would lie
    between them and split the memory that is free afterwards.

    Args:
        parameters: The trained weights.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        sizes = [-(-p.numel() // _ALIGNMENT_VALUES) * _ALIGNMENT_VALUES for p in self._parameters]
        first = self._parameters[0]
        self._values = torch.zeros(sum(sizes), dtype=torch.float32, device=first.device)
        self._views: list[torch.Tensor] = []
        start = 0
        for parameter, size in zip(self._parameters, sizes, strict=True):
            self._views.append(self._values[start : start + parameter.numel()].view_as(parameter))
            start += size

    def clear(self) -> None:
        """Set all gradients to zero, and give each weight its own again (the Trainer takes them away after a step)."""
        self._values.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
