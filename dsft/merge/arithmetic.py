"""The arithmetic of a merge: the rows of each merged tensor in float32, and what of the update rounding leaves."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsft.core.models.weight_files import WeightFiles
from dsft.merge.adapter import Adapter
from dsft.merge.nf4 import round_to_nf4
from dsft.merge.plan import LowRankUpdate, MergePlan, Recipe, TokenRows
from dsft.merge.weights import MergedTensor

if TYPE_CHECKING:
    import torch

_PIECE_VALUES = 2**20
"""Values in a piece: float32 pieces of 4 MiB stay in the processor's cache from reading to writing."""


@dataclass
class UpdateShare:
    """How much of an update is left after rounding, summed over tensors.

    Attributes:
        kept: Products of (rounded - base) and the exact update, summed.
        exact: Squares of the exact update, summed.
    """

    kept: float = 0.0
    exact: float = 0.0

    def add(self, rounded: "torch.Tensor", merged: "torch.Tensor", before: "torch.Tensor") -> None:
        """Count rows of a weight: after rounding, exact in float32, and before the update."""
        import torch

        update, kept = (merged - before).flatten(), (rounded.float() - before).flatten()
        self.kept += float(torch.dot(kept, update))
        self.exact += float(torch.dot(update, update))

    @property
    def share(self) -> float | None:
        """The projection of what was added on what was to be added; None where nothing was."""
        return self.kept / self.exact if self.exact > 0 else None


@dataclass(frozen=True)
class MergeSource:
    """Reads base and adapter and makes the merged model's tensors of them.

    Attributes:
        plan: How each tensor is made.
        base: The base model's tensors.
        adapter: The adapter.
        device: Where products are computed.
        nf4_dtype: Compute type of the training whose NF4 round trip the update is added to; None for the base as it is.
    """

    plan: MergePlan
    base: WeightFiles
    adapter: Adapter
    device: "torch.device"
    nf4_dtype: "torch.dtype | None"
    _recipes: dict[str, Recipe] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_recipes", {recipe.tensor.name: recipe for recipe in self.plan.recipes})

    @property
    def tensors(self) -> tuple[MergedTensor, ...]:
        """All tensors, in the order they are written."""
        return tuple(recipe.tensor for recipe in self.plan.recipes)

    def read_float32(self, tensor: MergedTensor) -> "Iterator[torch.Tensor]":
        """Yield a merged tensor in float32 on the CPU, in pieces of consecutive rows."""
        for piece, _ in self.merge(self._recipes[tensor.name]):
            yield piece.cpu()

    def merge(self, recipe: Recipe) -> "Iterator[tuple[torch.Tensor, torch.Tensor | None]]":
        """Yield a merged tensor in pieces of consecutive rows.

        Returns:
            Pairs of the merged rows in float32 and, where the tensor has a low-rank update, the rows before it.
        """
        pieces = self.read_source(recipe)
        if recipe.update is not None:
            yield from _UpdatedRows(recipe.update, self).merge(pieces, lambda: self.read_source(recipe))
            return
        first = 0
        for piece in pieces:
            if recipe.bias_update is not None:
                added = self.read_adapter(recipe.bias_update.name)[first : first + len(piece)]
                piece.add_(added * recipe.bias_update.scaling)
            if recipe.token_rows is not None:
                self._replace_rows(recipe.token_rows, piece, first)
            yield piece, None
            first += len(piece) if piece.ndim else 1

    def read_source(self, recipe: Recipe) -> "Iterator[torch.Tensor]":
        """Yield the tensor that a recipe starts from in float32, in pieces of consecutive rows."""
        import torch

        rows = recipe.tensor.shape[0] if recipe.tensor.shape else 1
        step = max(1, _PIECE_VALUES * rows // max(1, math.prod(recipe.tensor.shape)))
        if recipe.origin == "adapter" or not recipe.tensor.shape or (recipe.is_quantized and self.nf4_dtype):
            whole = self._read_whole(recipe)
            for piece in torch.split(whole, step) if recipe.tensor.shape else (whole,):
                yield piece.to(self.device).float()
            return
        for first in range(0, rows, step):
            piece = self.base.read_rows(recipe.source, first, min(first + step, rows))
            yield piece.to(self.device).float()

    def read_adapter(self, name: str) -> "torch.Tensor":
        """Return a tensor of the adapter in float32."""
        return self.adapter.weights.read(name).to(self.device).float()

    def _read_whole(self, recipe: Recipe) -> "torch.Tensor":
        if recipe.origin == "adapter":
            return self.adapter.weights.read(recipe.source)
        weight = self.base.read(recipe.source)
        if recipe.is_quantized and self.nf4_dtype is not None:
            return round_to_nf4(weight.to(self.device), self.nf4_dtype)
        return weight

    def _replace_rows(self, token_rows: TokenRows, piece: "torch.Tensor", first: int) -> None:
        rows = self.read_adapter(token_rows.name)
        for position, index in enumerate(token_rows.indices):
            if first <= index < first + len(piece):
                piece[index - first] = rows[position]


class _UpdatedRows:
    """Adds a low-rank update to the rows of a weight.

    W' = W + s·B·A (LoRA, arXiv:2106.09685, section 4.1); with magnitudes m each output's weights are then scaled to the
    norm m (DoRA, arXiv:2402.09353, equation 5). A weight stored as inputs x outputs gets the transposed product.
    """

    def __init__(self, update: LowRankUpdate, source: MergeSource) -> None:
        self._site = update.site
        a, b = source.read_adapter(update.a), source.read_adapter(update.b)
        # Rows of the stored weight are outputs, or inputs where it is transposed.
        self._rows, self._columns = (a.T, b.T) if update.site.is_transposed else (b, a)
        self._magnitudes = None if update.magnitudes is None else source.read_adapter(update.magnitudes)

    def merge(
        self, pieces: "Iterator[torch.Tensor]", read_again: "Callable[[], Iterator[torch.Tensor]]"
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Yield pairs of rows after and before the update.

        Args:
            pieces: The weight's rows in float32, from first to last.
            read_again: Begins again at the first row: the norm of a column takes all rows.
        """
        column_norms = None
        if self._magnitudes is not None and self._site.is_transposed:
            column_norms = self._find_column_norms(read_again())
        for first, before, after in self._add(pieces):
            yield self._scale(after, first, column_norms), before

    def _add(self, pieces: "Iterator[torch.Tensor]") -> "Iterator[tuple[int, torch.Tensor, torch.Tensor]]":
        first = 0
        for before in pieces:
            update = self._rows[first : first + len(before)] @ self._columns
            # In this order (product, scaling, sum) PEFT's float32 merge is met to the last bit.
            yield first, before, before + update.mul_(self._site.scaling)
            first += len(before)

    def _find_column_norms(self, pieces: "Iterator[torch.Tensor]") -> "torch.Tensor":
        squares: torch.Tensor | None = None
        for _, _, after in self._add(pieces):
            more = after.double().square().sum(dim=0)
            squares = more if squares is None else squares + more
        if squares is None:
            raise ValueError("a weight has at least one row")
        return squares.sqrt().float()

    def _scale(self, rows: "torch.Tensor", first: int, column_norms: "torch.Tensor | None") -> "torch.Tensor":
        if self._magnitudes is None:
            return rows
        if column_norms is not None:
            return rows * (self._magnitudes / column_norms)
        magnitudes = self._magnitudes[first : first + len(rows)]
        return rows * (magnitudes / rows.square().sum(dim=1).sqrt()).unsqueeze(1)
