"""Linear layers that take the same input, each with LoRA, as one matrix product forward and one backward.

A layer computes y = W x + s B (A x). With x and s A x side by side in a row, and W and B in another, that is one
product with a slightly longer inner dimension, summed in float32 and rounded once; and so are the outputs of several
layers, and the gradient at their common input. No product is followed by an addition of its own.
"""

import itertools
from collections.abc import Sequence

import torch

from dsft.core.engine.flat_lora import FlatMatrix
from dsft.core.engine.nf4_weight import Nf4Weight


class Workspace:
    """One piece of memory that weights are dequantized into, for one product at a time.

    Args:
        num_values: Of the largest weight.
        dtype: Compute type.
        device: Where.
    """

    def __init__(self, num_values: int, dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.empty(num_values, dtype=dtype, device=device)

    def take(self, num_rows: int, num_columns: int) -> torch.Tensor:
        """Return its beginning as a matrix, with what the last weight left in it."""
        return self._values[: num_rows * num_columns].view(num_rows, num_columns)


class Projection:
    """Layers side by side: frozen weights W, LoRA's A and B.

    Args:
        weights: Of the layers below one another, in one piece or several.
        num_outputs: Of each layer.
        factors_a: All layers' A, one below the other: [layers * rank, num_inputs].
        factors_b: Each layer's B, one below the other: [all outputs, rank].
        scaling: LoRA's factor s of the update, alpha / rank.
        bias: [all outputs], frozen; None where no layer has one.
        workspace: Where weights are dequantized.
    """

    def __init__(
        self,
        weights: Sequence[Nf4Weight],
        num_outputs: Sequence[int],
        factors_a: FlatMatrix,
        factors_b: FlatMatrix,
        scaling: float,
        bias: torch.Tensor | None,
        workspace: Workspace,
    ) -> None:
        self._weights = list(weights)
        self._a = factors_a
        self._b = factors_b
        self._scaling = scaling
        self.bias = bias
        self._workspace = workspace
        self.num_inputs = weights[0].num_inputs
        self.num_outputs = sum(num_outputs)
        self._rank = factors_b.weight.shape[1]
        self.low_width = self._rank * len(num_outputs)
        self._ends = [0, *itertools.accumulate(num_outputs)]
        self._a_columns = factors_a.copy.t()
        # Equally wide layers are one batched product: [layers, outputs, rank].
        self._is_batched = len(num_outputs) > 1 and len(set(num_outputs)) == 1
        shape = (len(num_outputs), num_outputs[0], self._rank)
        self._b_batch = factors_b.copy.view(shape) if self._is_batched else factors_b.copy
        self._b_gradients = factors_b.gradient.view(shape) if self._is_batched else factors_b.gradient

    def workspace_values(self) -> int:
        """Return the values of the largest matrix that `extend_forward` or `extend_backward` writes."""
        forward = self.num_outputs * (self.num_inputs + self.low_width)
        return max(forward, (self.num_outputs + self.low_width) * self.num_inputs)

    def set_workspace(self, workspace: Workspace) -> None:
        """Take another workspace."""
        self._workspace = workspace

    def dequantize(self) -> torch.Tensor:
        """Return W alone, [num_outputs, num_inputs], in the workspace."""
        matrix = self._workspace.take(self.num_outputs, self.num_inputs)
        self._fill(matrix)
        return matrix

    def extend_forward(self) -> torch.Tensor:
        """Return [W | B], [num_outputs, num_inputs + low_width], in the workspace; each layer has own columns for B."""
        matrix = self._workspace.take(self.num_outputs, self.num_inputs + self.low_width)
        if len(self._weights) == 1:
            self._weights[0].dequantize_beside(matrix, self._b.copy, self._ends[1:])
            return matrix
        self._fill(matrix[:, : self.num_inputs])
        beside = matrix[:, self.num_inputs :]
        beside.zero_()
        for index in range(len(self._ends) - 1):
            rows = self._rows(index)
            self._low(beside[rows], index).copy_(self._b.copy[rows])
        return matrix

    def extend_backward(self) -> torch.Tensor:
        """Return W above A, [num_outputs + low_width, num_inputs], in the workspace."""
        matrix = self._workspace.take(self.num_outputs + self.low_width, self.num_inputs)
        if len(self._weights) == 1:
            self._weights[0].dequantize_above(matrix, self._a.copy)
            return matrix
        self._fill(matrix)
        matrix[self.num_outputs :].copy_(self._a.copy)
        return matrix

    @property
    def factors_b(self) -> torch.Tensor:
        """All layers' B in the compute type, [num_outputs, rank]."""
        return self._b.copy

    def lower(self, states: torch.Tensor) -> torch.Tensor:
        """Return s A x of all layers, [tokens, low_width].

        Args:
            states: x, [tokens, num_inputs].
        """
        low = states.new_empty(len(states), self.low_width)
        return torch.addmm(low, states, self._a_columns, beta=0, alpha=self._scaling, out=low)

    def lower_gradient(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """Write s Bᵀ dy of each layer, which is the gradient at A x.

        Args:
            gradient: dy of all layers side by side, [tokens, num_outputs].
            out: [tokens, low_width].
        """
        if self._is_batched:
            lows = self._batch(out)
            torch.baddbmm(lows, self._batch(gradient), self._b_batch, beta=0, alpha=self._scaling, out=lows)
            return
        for index, part in enumerate(self._parts(gradient)):
            low = self._low(out, index)
            torch.addmm(low, part, self._b.copy[self._rows(index)], beta=0, alpha=self._scaling, out=low)

    def accumulate_b(self, gradient: torch.Tensor, low: torch.Tensor) -> None:
        """Add dyᵀ (s A x) of each layer to the gradient of B.

        Args:
            gradient: dy, [tokens, num_outputs].
            low: What `lower` returned, [tokens, low_width].
        """
        if self._is_batched:
            add_product(self._b_gradients, self._batch(gradient).transpose(1, 2), self._batch(low))
            return
        for index, part in enumerate(self._parts(gradient)):
            add_product(self._b.gradient[self._rows(index)], part.t(), self._low(low, index))

    def accumulate_a(self, low_gradient: torch.Tensor, states: torch.Tensor) -> None:
        """Add (s Bᵀ dy)ᵀ x to the gradient of A.

        Args:
            low_gradient: What `lower_gradient` wrote, [tokens, low_width].
            states: x, [tokens, num_inputs].
        """
        add_product(self._a.gradient, low_gradient.t(), states)

    def _batch(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what stands side by side for each layer, [tokens, layers * n], as [layers, tokens, n]."""
        return rows.view(len(rows), len(self._ends) - 1, -1).transpose(0, 1)

    def _parts(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [rows[:, self._rows(index)] for index in range(len(self._ends) - 1)]

    def _rows(self, index: int) -> slice:
        return slice(self._ends[index], self._ends[index + 1])

    def _low(self, low: torch.Tensor, index: int) -> torch.Tensor:
        return low[:, index * self._rank : (index + 1) * self._rank]

    def _fill(self, matrix: torch.Tensor) -> None:
        start = 0
        for weight in self._weights:
            weight.dequantize(matrix[start : start + weight.num_outputs])
            start += weight.num_outputs


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a product, or a batch of them, to a float32 total, summed in float32 throughout."""
    multiply = torch.addmm if total.dim() == 2 else torch.baddbmm
    if left.dtype != torch.float32 and left.is_cuda:
        multiply(total, left, right, torch.float32, out=total)
    else:
        multiply(total, left.float(), right.float(), out=total)
