"""The arithmetic of a merge: the rows of each merged tensor in float32, and what of the update rounding leaves."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from dsft.core.errors import MergeError
from dsft.core.models.weight_files import WeightFiles
from dsft.merge.adapter import Adapter, AdapterWeights
from dsft.merge.nf4 import round_to_nf4
from dsft.merge.plan import MergePlan, Recipe
from dsft.merge.weights import MergedTensor, is_finite
from dsft.merge.workers import count_workers, run_in_order

_PIECE_VALUES = 2**20
"""Values in a piece: float32 pieces of 4 MiB stay in the processor's cache from reading to writing."""


class MergedRows(NamedTuple):
    """Consecutive rows of a merged tensor.

    Attributes:
        merged: The rows in float32.
        before: The rows before a low-rank update; None where the tensor has none.
    """

    merged: torch.Tensor
    before: torch.Tensor | None


@dataclass
class UpdateShare:
    """How much of an update is left after rounding, summed over tensors.

    Attributes:
        kept: Products of (rounded - base) and the exact update, summed.
        exact: Squares of the exact update, summed.
    """

    kept: float = 0.0
    exact: float = 0.0

    def add(self, other: "UpdateShare") -> None:
        """Count other rows too."""
        self.kept += other.kept
        self.exact += other.exact

    @property
    def share(self) -> float | None:
        """The projection of what was added on what was to be added; None where nothing was."""
        return self.kept / self.exact if self.exact > 0 else None


def measure_share(rounded: torch.Tensor, rows: MergedRows) -> UpdateShare:
    """Return how much of the update of some rows is left after they were rounded."""
    if rows.before is None:
        return UpdateShare()
    update, kept = (rows.merged - rows.before).flatten(), (rounded.float() - rows.before).flatten()
    return UpdateShare(float(torch.dot(kept, update)), float(torch.dot(update, update)))


def check_finite(adapter: Adapter) -> None:
    """Refuse an adapter with NaN or infinite numbers.

    Raises:
        MergeError: The first tensor that holds one.
    """
    for name in sorted(adapter.weights.names):
        places = divide_rows(adapter.weights.shape(name), _PIECE_VALUES)
        if not all(is_finite(_read_rows(adapter.weights, name, *place)) for place in places):
            raise MergeError(
                f"The adapter {adapter.folder} holds NaN or infinite numbers in {name}.",
                "Train it again with a lower learning rate, or take an earlier checkpoint.",
            )


def _read_rows(weights: WeightFiles | AdapterWeights, name: str, first: int, last: int) -> torch.Tensor:
    return weights.read_rows(name, first, last) if weights.shape(name) else weights.read(name)[None]


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
    device: torch.device
    nf4_dtype: torch.dtype | None
    _recipes: dict[str, Recipe] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_recipes", {recipe.tensor.name: recipe for recipe in self.plan.recipes})

    @property
    def tensors(self) -> tuple[MergedTensor, ...]:
        """All tensors, in the order they are written."""
        return tuple(recipe.tensor for recipe in self.plan.recipes)

    def read_float32(self, tensor: MergedTensor) -> Iterator[torch.Tensor]:
        """Yield a merged tensor in float32 on the CPU, in pieces of consecutive rows."""
        works = self.divide(self._recipes[tensor.name])
        for rows in run_in_order(works, count_workers(self.device.type)):
            yield rows.merged.cpu()

    def divide(self, recipe: Recipe) -> Iterator[Callable[[], MergedRows]]:
        """Yield what makes each piece of a merged tensor, in the order of the rows; any thread may run it."""
        read = self._open(recipe)
        change = self._prepare_change(recipe, read)

        def make(first: int, last: int) -> MergedRows:
            rows = read(first, last)
            return MergedRows(rows, None) if change is None else change(rows, first)

        for first, last in divide_rows(recipe.tensor.shape, _PIECE_VALUES):
            yield partial(make, first, last)

    def divide_source(self, recipe: Recipe) -> Iterator[Callable[[], torch.Tensor]]:
        """Yield what reads each piece of the tensor that a recipe starts from, in float32; any thread may run it."""
        read = self._open(recipe)
        for first, last in divide_rows(recipe.tensor.shape, _PIECE_VALUES):
            yield partial(read, first, last)

    def read_adapter(self, name: str) -> torch.Tensor:
        """Return a tensor of the adapter in float32."""
        return self.adapter.weights.read(name).to(self.device).float()

    def _open(self, recipe: Recipe) -> "_ReadRows":
        """Return what reads rows of the tensor that a recipe starts from, in float32, in memory of their own."""
        if recipe.is_quantized and self.nf4_dtype is not None:
            rounded = round_to_nf4(self.base.read(recipe.source).to(self.device), self.nf4_dtype)
            return lambda first, last: rounded[first:last].to(torch.float32, copy=True)
        stored = self.adapter.weights if recipe.origin == "adapter" else self.base
        return lambda first, last: _read_rows(stored, recipe.source, first, last).to(self.device).float()

    def _prepare_change(self, recipe: Recipe, read: "_ReadRows") -> Callable[[torch.Tensor, int], MergedRows] | None:
        if recipe.update is not None:
            return _LowRankAddition(recipe, self, read).apply
        if recipe.bias_update is not None:
            return _BiasAddition(self.read_adapter(recipe.bias_update.name), recipe.bias_update.scaling).apply
        if recipe.token_rows is not None:
            return _RowReplacement(self.read_adapter(recipe.token_rows.name), recipe.token_rows.indices).apply
        return None


_ReadRows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class _BiasAddition:
    added: torch.Tensor
    scaling: float

    def apply(self, rows: torch.Tensor, first: int) -> MergedRows:
        return MergedRows(rows + self.added[first : first + len(rows)] * self.scaling, None)


@dataclass(frozen=True)
class _RowReplacement:
    replacements: torch.Tensor
    indices: tuple[int, ...]

    def apply(self, rows: torch.Tensor, first: int) -> MergedRows:
        for position, index in enumerate(self.indices):
            if first <= index < first + len(rows):
                rows[index - first] = self.replacements[position]
        return MergedRows(rows, None)


class _LowRankAddition:
    """Adds a low-rank update to the rows of a weight.

    W' = W + s·B·A (LoRA, arXiv:2106.09685, section 4.1); with magnitudes m each output's weights are then scaled to the
    norm m (DoRA, arXiv:2402.09353, equation 5). A weight stored as inputs x outputs gets the transposed product.
    """

    def __init__(self, recipe: Recipe, source: MergeSource, read: _ReadRows) -> None:
        if recipe.update is None:
            raise ValueError(f"{recipe.tensor.name} has no low-rank update")
        site = recipe.update.site
        a, b = source.read_adapter(recipe.update.a), source.read_adapter(recipe.update.b)
        self._scaling = site.scaling
        # Rows of the stored weight are outputs, or inputs where it is transposed.
        self._rows, self._columns = (a.T, b.T) if site.is_transposed else (b, a)
        self._magnitudes = None if recipe.update.magnitudes is None else source.read_adapter(recipe.update.magnitudes)
        self._column_norms = None
        if self._magnitudes is not None and site.is_transposed:
            self._column_norms = self._find_column_norms(read, recipe.tensor.shape)

    def apply(self, before: torch.Tensor, first: int) -> MergedRows:
        after = self._add(before, first)
        if self._magnitudes is None:
            return MergedRows(after, before)
        if self._column_norms is not None:
            return MergedRows(after * (self._magnitudes / self._column_norms), before)
        magnitudes = self._magnitudes[first : first + len(after)]
        return MergedRows(after * (magnitudes / after.square().sum(dim=1).sqrt()).unsqueeze(1), before)

    def _add(self, before: torch.Tensor, first: int) -> torch.Tensor:
        update = self._rows[first : first + len(before)] @ self._columns
        # In this order (product, scaling, sum) PEFT's float32 merge is met to the last bit.
        return before + update.mul_(self._scaling)

    def _find_column_norms(self, read: _ReadRows, shape: tuple[int, ...]) -> torch.Tensor:
        squares = torch.zeros(shape[1], dtype=torch.float64, device=self._rows.device)
        for first, last in divide_rows(shape, _PIECE_VALUES):
            squares += self._add(read(first, last), first).double().square().sum(dim=0)
        return squares.sqrt().float()


def divide_rows(shape: tuple[int, ...], most_values: int) -> Iterator[tuple[int, int]]:
    """Yield first and behind-the-last row of pieces of about `most_values`; a scalar counts as a row."""
    num_rows = shape[0] if shape else 1
    step = max(1, most_values * num_rows // max(1, math.prod(shape)))
    for first in range(0, num_rows, step):
        yield first, min(first + step, num_rows)
