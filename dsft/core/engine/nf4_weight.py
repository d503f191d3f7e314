"""A frozen 4-bit weight as bitsandbytes keeps it, dequantized into a buffer of the caller's."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

_BLOCK = 64
_GROUP_BLOCKS = 256
_BLOCKS_A_STEP, _STEPS_A_PROGRAM, _NUM_WARPS = 16, 8, 4
_FACTOR_ROWS, _FACTOR_VALUES = 16, 4096
_NOTHING, _BESIDE, _BELOW = 0, 1, 2


@dataclass(frozen=True)
class Nf4Weight:
    """The weight of a linear layer, or of several below one another, in NF4 with double quantization.

    Attributes:
        num_outputs: Rows.
        num_inputs: Columns, a multiple of 64.
        packed: uint8 [num_outputs * num_inputs / 2], two weights in a byte.
        scales: uint8 [num_outputs * num_inputs / 64]: of each block of 64 weights, coded.
        scale_code: float32 [256]: what the codes mean.
        group_scales: float32 [groups of 256 blocks]: by which that is multiplied.
        group_offsets: float32, the same shape: what is added to it.
        code: float32 [16]: the values of NF4.
    """

    num_outputs: int
    num_inputs: int
    packed: torch.Tensor
    scales: torch.Tensor
    scale_code: torch.Tensor
    group_scales: torch.Tensor
    group_offsets: torch.Tensor
    code: torch.Tensor

    @classmethod
    def of(cls, layer: Any) -> Self:
        """Take the weight of a bitsandbytes Linear4bit.

        Raises:
            ValueError: It is quantized in another way.
        """
        state = layer.weight.quant_state
        inner = state.state2 if state.nested else None
        blocks = (state.blocksize, inner.blocksize if inner is not None else None)
        if (
            inner is None
            or state.quant_type != "nf4"
            or blocks != (_BLOCK, _GROUP_BLOCKS)
            or layer.in_features % _BLOCK
        ):
            raise ValueError(f"its weights are {state.quant_type} in blocks of {blocks}, {layer.in_features} wide")
        return cls(
            num_outputs=layer.out_features,
            num_inputs=layer.in_features,
            packed=layer.weight.data.view(-1),
            scales=state.absmax,
            scale_code=inner.code,
            group_scales=inner.absmax,
            group_offsets=state.offset.to(inner.absmax.device).expand_as(inner.absmax).contiguous(),
            code=state.code,
        )

    def dequantize(self, out: torch.Tensor) -> None:
        """Write the weight as bitsandbytes dequantizes it, bit for bit.

        Args:
            out: [num_outputs, num_inputs] in the compute type; rows may be parts of longer ones.
        """
        if out.is_cuda:
            self._launch(out, None, side=_NOTHING)
            return
        groups = torch.arange(len(self.scales), device=out.device) // _GROUP_BLOCKS
        scales = self.scale_code[self.scales.int()] * self.group_scales[groups] + self.group_offsets[groups]
        indices = torch.stack([self.packed >> 4, self.packed & 15], dim=1).int()
        values = self.code[indices].view(-1, _BLOCK) * scales.unsqueeze(1)
        out.copy_(values.view(self.num_outputs, self.num_inputs))

    def dequantize_beside(self, out: torch.Tensor, factors_b: torch.Tensor, ends: Sequence[int]) -> None:
        """Write the weight, and behind each row each layer's B in columns of its own, with zeros beside it.

        Args:
            out: [num_outputs, num_inputs + layers * rank], dense.
            factors_b: [num_outputs, rank], in the same type.
            ends: Row behind each layer's last.
        """
        rank = factors_b.shape[1]
        if out.is_cuda:
            self._launch(out, factors_b, side=_BESIDE, ends=ends)
            return
        self.dequantize(out[:, : self.num_inputs])
        out[:, self.num_inputs :].zero_()
        for index, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            column = self.num_inputs + index * rank
            out[start:end, column : column + rank].copy_(factors_b[start:end])

    def dequantize_above(self, out: torch.Tensor, factors_a: torch.Tensor) -> None:
        """Write the weight, and A below it.

        Args:
            out: [num_outputs + layers * rank, num_inputs], dense.
            factors_a: [layers * rank, num_inputs], dense, in the same type.
        """
        if out.is_cuda:
            self._launch(out, factors_a, side=_BELOW)
            return
        self.dequantize(out[: self.num_outputs])
        out[self.num_outputs :].copy_(factors_a)

    def _launch(self, out: torch.Tensor, factors: torch.Tensor | None, side: int, ends: Sequence[int] = ()) -> None:
        from dsft.core.engine.nf4_kernels import extend

        num_blocks = len(self.scales)
        num_programs = -(-num_blocks // (_BLOCKS_A_STEP * _STEPS_A_PROGRAM))
        width = out.shape[1] - self.num_inputs
        second, third = (*ends, self.num_outputs, self.num_outputs)[:2]
        rank, num_values, num_others = 1, 0, 0
        if factors is not None:
            rank, num_values = factors.shape[1], factors.numel()
            num_others = -(-self.num_outputs // _FACTOR_ROWS) if side == _BESIDE else -(-num_values // _FACTOR_VALUES)
        extend[(num_programs + num_others,)](
            self.packed.view(torch.int32), self.scales, self.scale_code, self.group_scales, self.group_offsets,
            self.code, out, out if factors is None else factors, num_blocks, out.stride(0), self.num_outputs,
            num_programs, width, rank, second, third, num_values, ROW_BLOCKS=self.num_inputs // _BLOCK,
            BLOCKS=_BLOCKS_A_STEP, REPEATS=_STEPS_A_PROGRAM, SIDE=side, ROWS=_FACTOR_ROWS,
            COLUMNS=1 << (max(width, 1) - 1).bit_length(), VALUES=_FACTOR_VALUES, num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def join(groups: Sequence[Sequence[Any]]) -> list[list[Nf4Weight]]:
    """Return the weights of a block's layers, of each group of them in as few pieces as possible.

    On a GPU all packed weights move into one piece of memory, a group's behind one another, and the layers' own tensors
    become views of it: one launch dequantizes a group. A block at a time leaves holes as large as a block, which the
    next one fills; a layer at a time would leave many that nothing fits into.

    Args:
        groups: bitsandbytes Linear4bit that stand below one another, with the same number of inputs.

    Raises:
        ValueError: One is quantized in another way.
    """
    weights = [[Nf4Weight.of(layer) for layer in layers] for layers in groups]
    packed = [weight.packed for group in weights for weight in group]
    if not packed[0].is_cuda:
        return weights
    room = torch.cat(packed)
    places = iter(room.split([len(part) for part in packed]))  # type: ignore[no-untyped-call]
    return [_join_group(layers, group, places) for layers, group in zip(groups, weights, strict=True)]


def _join_group(layers: Sequence[Any], weights: Sequence[Nf4Weight], places: Iterator[torch.Tensor]) -> list[Nf4Weight]:
    moved = []
    for layer, weight in zip(layers, weights, strict=True):
        place = next(places)
        layer.weight.data = place.view(layer.weight.data.shape)
        moved.append(replace(weight, packed=place))
    first = moved[0]
    # A group of scales must not reach from one layer into the next.
    is_even = all(len(weight.scales) % _GROUP_BLOCKS == 0 for weight in moved[:-1])
    is_alike = all(torch.equal(weight.scale_code, first.scale_code) for weight in moved)
    if len(moved) == 1 or not is_even or not is_alike:
        return moved
    num_bytes = sum(len(weight.packed) for weight in moved)
    joined = Nf4Weight(
        num_outputs=sum(weight.num_outputs for weight in moved),
        num_inputs=first.num_inputs,
        packed=first.packed.as_strided((num_bytes,), (1,)),
        scales=torch.cat([weight.scales for weight in moved]),
        scale_code=first.scale_code,
        group_scales=torch.cat([weight.group_scales for weight in moved]),
        group_offsets=torch.cat([weight.group_offsets for weight in moved]),
        code=first.code,
    )
    scales = torch.split(joined.scales, [len(weight.scales) for weight in moved])
    groups = torch.split(joined.group_scales, [len(weight.group_scales) for weight in moved])
    for index, layer in enumerate(layers):
        state = layer.weight.quant_state
        state.absmax, state.state2.absmax = scales[index], groups[index]
    return [joined]
