"""All LoRA weights of a model in one tensor, their gradients in another: an optimizer steps them as one parameter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

ALIGNMENT_VALUES = 128
"""Values between two possible starts of a run: 512 bytes in float32, 256 in a 16-bit copy."""


@dataclass(frozen=True)
class FlatMatrix:
    """Parameters that lie behind one another, as one matrix [sum of their rows, columns]; its tensors are views.

    Attributes:
        weight: The weights, float32.
        gradient: Their gradients, float32.
        copy: The weights in the compute type as of the last `FlatLora.refresh`; in float32 the weights themselves.
    """

    weight: torch.Tensor
    gradient: torch.Tensor
    copy: torch.Tensor


class FlatLora:
    """LoRA's weights and gradients as two tensors, of which a model's own parameters and their gradients are views.

    An optimizer that steps `parameter` runs its kernels once, not once for each of hundreds of small tensors. Made
    before the first pass, the gradients lie below the activations; made in the first backward pass they would lie
    between them and split the memory that is free afterwards.

    The model keeps its parameters, their names and shapes: saving, loading and counting them works as before.

    Args:
        runs: Parameters in the order they are to have. Those of a run lie directly behind one another, so that
            `matrix` can take them as one; between runs starts are aligned.
        compute_dtype: The type of `copy`; None for no copy.

    Raises:
        ValueError: There are no parameters, one of them comes twice, or they are not all float32 on one device.
    """

    def __init__(self, runs: Sequence[Sequence[torch.nn.Parameter]], compute_dtype: torch.dtype | None = None) -> None:
        self._starts, num_values = _lay_out(runs)
        self._device = _find_device(self._starts)
        values = torch.zeros(num_values, dtype=torch.float32, device=self._device)
        for parameter in self._starts:
            view = self.view_of(values, parameter)
            parameter.data = view.copy_(parameter.data)
        self.parameter = torch.nn.Parameter(values)
        self.gradients = torch.zeros_like(values)
        self._gradient_views = [self.view_of(self.gradients, parameter) for parameter in self._starts]
        needs_copy = compute_dtype is not None and compute_dtype != torch.float32
        self._values = values
        self.copy = torch.empty_like(values, dtype=compute_dtype) if needs_copy else values
        self.refresh()
        self.clear_gradients()

    @classmethod
    def each_alone(cls, parameters: Iterable[torch.nn.Parameter]) -> Self:
        """Put the trained ones of some parameters together, each a run of its own, without a copy."""
        return cls([[parameter] for parameter in parameters if parameter.requires_grad])

    @property
    def parts(self) -> list[torch.nn.Parameter]:
        """The model's own parameters, in their order in the flat tensor."""
        return list(self._starts)

    @property
    def has_copy(self) -> bool:
        """Whether `copy` takes memory of its own, and has to be refreshed when the weights have changed."""
        return self.copy is not self._values

    def clear_gradients(self) -> None:
        """Set all gradients to zero, and give each weight its own again (the Trainer takes them away after a step)."""
        self.gradients.zero_()
        self.parameter.grad = self.gradients
        for parameter, view in zip(self._starts, self._gradient_views, strict=True):
            parameter.grad = view

    def refresh(self) -> None:
        """Bring the copy up to the weights."""
        if self.has_copy:
            self.copy.copy_(self._values)

    def matrix(self, parameters: Sequence[torch.nn.Parameter]) -> FlatMatrix:
        """Return parameters of one run, in their order there, as one matrix.

        Args:
            parameters: Neighbours in a run, of two dimensions, with the same number of columns.

        Raises:
            ValueError: They are not neighbours, or their rows differ in length.
        """
        num_columns = parameters[0].shape[-1]
        start = end = self._starts[parameters[0]]
        for parameter in parameters:
            if parameter.dim() != 2 or parameter.shape[1] != num_columns:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} among rows of {num_columns} values")
            if self._starts[parameter] != end:
                raise ValueError("the parameters do not lie directly behind one another")
            end += parameter.numel()

        def cut(flat: torch.Tensor) -> torch.Tensor:
            return flat[start:end].view(-1, num_columns)

        return FlatMatrix(cut(self._values), cut(self.gradients), cut(self.copy))

    def view_of(self, flat: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return what belongs to one of `parts` in a tensor laid out as `parameter`, in its shape."""
        start = self._starts[parameter]
        return flat[start : start + parameter.numel()].view(parameter.shape)


def align(num_values: int) -> int:
    """Return the values a run of `num_values` takes with what is left free behind it."""
    return -(-num_values // ALIGNMENT_VALUES) * ALIGNMENT_VALUES


def _lay_out(runs: Sequence[Sequence[torch.nn.Parameter]]) -> tuple[dict[torch.nn.Parameter, int], int]:
    starts: dict[torch.nn.Parameter, int] = {}
    end = 0
    for run in runs:
        for parameter in run:
            if parameter in starts:
                raise ValueError("a parameter comes twice")
            starts[parameter] = end
            end += parameter.numel()
        end = align(end)
    return starts, end


def _find_device(parameters: Iterable[torch.nn.Parameter]) -> torch.device:
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) != 1:
        raise ValueError(f"LoRA's weights must be of one kind, not of {sorted(map(str, kinds))}")
    [(dtype, device)] = kinds
    if dtype != torch.float32:
        raise ValueError(f"LoRA's weights must be float32, not {dtype}")
    return device
