"""The linear layers of a model taken apart for decoding: weights side by side, and the adapter's factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch.nn import functional

from dsft.infer.decoding.cuda import nf4_kernels
from dsft.infer.decoding.cuda.nf4_look_up import TABLES

MAX_FEW_TOKENS = 64
"""Up to here NF4 weights are unpacked on the way into the sum; above, written out once and multiplied by cuBLAS."""

_RANK_MULTIPLE = 16

# Found on an H200 for the layers of the 6.7B model.
_LANE_STRETCH = 1024  # of K, that the 32 lanes of a warp read in one load each
_NUM_VECTORS = 1
_ROWS_ONE = 32
_FEW_ROWS = 8192
_FEW_INPUTS = 8192


@dataclass(frozen=True)
class Product:
    """The result of some linear layers on the same input, laid side by side.

    Attributes:
        parts: float32 [num_parts, T, N] to be added up, or one part in the model's type.
        lowered: A x of the adapter, [num_parts, T, num_ranks]; None where nothing is left to add.
    """

    parts: torch.Tensor
    lowered: torch.Tensor | None


@dataclass(frozen=True)
class Update:
    """The adapter's factors of some layers side by side, in the model's type.

    Attributes:
        rows_a: [num_layers * rank, K].
        rows_b: [N, rank], scaled; ranks are padded with zeros to a power of two.
        rank: The padded rank.
        widths: Outputs of each layer.
    """

    rows_a: torch.Tensor
    rows_b: torch.Tensor
    rank: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Nf4Rows:
    """NF4 weights [N, K] as bitsandbytes lays them out; see `nf4_kernels`."""

    packed: torch.Tensor
    scales: torch.Tensor
    scale_code: torch.Tensor
    group_scales: torch.Tensor
    group_offsets: torch.Tensor
    code: torch.Tensor
    num_rows: int

    @property
    def scale_tensors(self) -> tuple[torch.Tensor, ...]:
        """What the kernels take beside the weights, in their order."""
        return (self.scales, self.scale_code, self.group_scales, self.group_offsets)


class FusedLinear:
    """Some linear layers that read the same input.

    Args:
        weights: Rows in NF4, one entry for each stretch that one launch can take; or one matrix [N, K].
        bias: [N], or None.
        update: The adapter's factors, or None.
        dtype: The model's type.
    """

    def __init__(
        self,
        weights: "Sequence[Nf4Rows] | torch.Tensor",
        bias: torch.Tensor | None,
        update: Update | None,
        num_inputs: int,
        dtype: torch.dtype,
    ) -> None:
        self._weights = weights
        self._bias = bias
        self._update = update
        self._num_inputs = num_inputs
        self._dtype = dtype
        self.width = len(weights) if isinstance(weights, torch.Tensor) else sum(rows.num_rows for rows in weights)

    def update(self, is_adapted: bool) -> Update | None:
        """Return the adapter's factors, where they take part."""
        return self._update if is_adapted else None

    def multiply(self, states: torch.Tensor, is_adapted: bool) -> Product:
        """Multiply a few tokens, at most MAX_FEW_TOKENS; what the adapter adds is left to the kernel that comes next.

        Args:
            states: [T, K].
            is_adapted: Whether the adapter takes part.
        """
        update = self.update(is_adapted)
        if isinstance(self._weights, torch.Tensor):
            parts = functional.linear(states, self._weights, self._bias)[None]
            return Product(parts, None if update is None else functional.linear(states, update.rows_a)[None])
        lowered = None
        num_splits = _choose_splits(self.width, len(states), self._num_inputs)
        parts = torch.empty(num_splits, len(states), self.width, dtype=torch.float32, device=states.device)
        if update is not None:
            lowered = torch.empty(
                num_splits, len(states), len(update.rows_a), dtype=torch.float32, device=states.device
            )
        first = 0
        for index, rows in enumerate(self._weights):
            appended = (update.rows_a, lowered) if update is not None and lowered is not None and index == 0 else None
            _launch(states, rows, parts[:, :, first:], appended, num_splits, self.width)
            first += rows.num_rows
        if self._bias is not None:
            parts[0] += self._bias
        return Product(parts, lowered)

    def multiply_many(self, states: torch.Tensor, is_adapted: bool) -> Product:
        """Multiply many tokens, [T, K], the adapter's part added."""
        if isinstance(self._weights, torch.Tensor):
            result = functional.linear(states, self._weights, self._bias)
        else:
            result = functional.linear(states, self._write_out(self._weights), self._bias)
        update = self.update(is_adapted)
        if update is not None:
            lowered = functional.linear(states, update.rows_a)
            first = 0
            for index, width in enumerate(update.widths):
                ranks = slice(index * update.rank, (index + 1) * update.rank)
                result[:, first : first + width].addmm_(lowered[:, ranks], update.rows_b[first : first + width].T)
                first += width
        return Product(result[None], None)

    def _write_out(self, stretches: Sequence[Nf4Rows]) -> torch.Tensor:
        device = stretches[0].packed.device
        weights = torch.empty(self.width, self._num_inputs, dtype=self._dtype, device=device)
        first = 0
        block_bytes = 1024
        for rows in stretches:
            num_bytes = rows.packed.numel()
            out = weights[first : first + rows.num_rows]
            nf4_kernels.unpack_weights[(triton.cdiv(num_bytes, block_bytes),)](
                rows.packed, *rows.scale_tensors, rows.code, out, num_bytes, BLOCK_BYTES=block_bytes
            )
            first += rows.num_rows
        return weights


def _choose_splits(num_rows: int, num_tokens: int, num_inputs: int) -> int:
    """Return into how many stretches of K a product is cut, so that the programs of a launch keep a card busy."""
    if num_tokens == 1:
        return -(-num_inputs // (_LANE_STRETCH * _NUM_VECTORS))
    return (4 if num_inputs <= _FEW_INPUTS else 2) if num_rows <= _FEW_ROWS else 2


def _launch(
    states: torch.Tensor,
    rows: Nf4Rows,
    out: torch.Tensor,
    appended: tuple[torch.Tensor, torch.Tensor] | None,
    num_splits: int,
    out_width: int,
) -> None:
    words = states.view(torch.int32)
    num_tokens, num_inputs = states.shape
    rows_a, out_a = appended if appended is not None else (states, out)
    num_rows_a = len(rows_a) if appended is not None else 0
    dtype = _triton_type(states.dtype)
    if num_tokens == 1:
        programs = triton.cdiv(rows.num_rows, _ROWS_ONE) + triton.cdiv(num_rows_a, nf4_kernels.ROWS_A)
        nf4_kernels.multiply_one[(programs, num_splits)](
            words, rows.packed.view(torch.int32), *rows.scale_tensors, out, rows_a.view(torch.int32), out_a,
            *TABLES, rows.num_rows, num_rows_a, out_width, K=num_inputs, DTYPE=dtype, ROWS=_ROWS_ONE,
            BLOCK_N=_ROWS_ONE, VECTORS=_NUM_VECTORS, num_warps=4,
        )  # fmt: skip
        return
    block, tile = 32, 16 if num_tokens <= 16 else 32
    programs = triton.cdiv(rows.num_rows, block) + triton.cdiv(num_rows_a, block)
    nf4_kernels.multiply_few[(programs, num_splits, triton.cdiv(num_tokens, tile))](
        words, rows.packed, *rows.scale_tensors, out, rows_a.view(torch.int32), out_a, num_tokens, rows.num_rows,
        num_rows_a, out_width, K=num_inputs, NUM_SPLITS=num_splits, DTYPE=dtype, BLOCK_T=tile, BLOCK_N=block,
        BLOCK_B=4, STAGES=3, num_warps=2,
    )  # fmt: skip


def _triton_type(dtype: torch.dtype) -> "triton.language.dtype":
    return {torch.bfloat16: triton.language.bfloat16, torch.float16: triton.language.float16}[dtype]


def pad_rank(rank: int) -> int:
    """Return the rank that factors are padded to: a power of two, at least 16."""
    return max(_RANK_MULTIPLE, 1 << (rank - 1).bit_length())
