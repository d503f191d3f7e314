"""A frozen 4-bit weight as bitsandbytes keeps it, dequantized into a buffer of the caller's."""

from dataclasses import dataclass
from typing import Any, Self

import torch

_BLOCK = 64
_GROUP_BLOCKS = 256
_BLOCKS_A_STEP, _STEPS_A_PROGRAM = 16, 8


@dataclass(frozen=True)
class Nf4Weight:
    """The weight of a linear layer: [num_outputs, num_inputs] in NF4 with double quantization.

    Attributes:
        num_outputs: Rows.
        num_inputs: Columns, a multiple of 64.
        packed: uint8 [num_outputs * num_inputs / 2, 1], two weights in a byte.
        state: bitsandbytes' record of the scales.
    """

    num_outputs: int
    num_inputs: int
    packed: torch.Tensor
    state: Any

    @classmethod
    def of(cls, layer: Any) -> Self:
        """Take the weight of a bitsandbytes Linear4bit.

        Raises:
            ValueError: It is quantized in another way.
        """
        state = layer.weight.quant_state
        inner = state.state2 if state.nested else None
        blocks = (state.blocksize, inner.blocksize if inner is not None else None)
        if state.quant_type != "nf4" or blocks != (_BLOCK, _GROUP_BLOCKS) or layer.in_features % _BLOCK:
            raise ValueError(f"its weights are {state.quant_type} in blocks of {blocks}, {layer.in_features} wide")
        return cls(layer.out_features, layer.in_features, layer.weight.data, state)

    def dequantize(self, out: torch.Tensor) -> None:
        """Write the weight as bitsandbytes dequantizes it, bit for bit.

        Args:
            out: [num_outputs, num_inputs] in the compute type; rows may be parts of longer ones.
        """
        if not out.is_cuda:
            from bitsandbytes.functional import dequantize_4bit

            out.copy_(dequantize_4bit(self.packed, self.state))
            return
        from dsft.core.engine import nf4_kernels as kernels

        row_blocks = self.num_inputs // _BLOCK
        num_blocks = self.num_outputs * row_blocks
        inner = self.state.state2
        kernels.dequantize[(-(-num_blocks // (_BLOCKS_A_STEP * _STEPS_A_PROGRAM)),)](
            self.packed.view(torch.int32), self.state.absmax, inner.code, inner.absmax, self.state.offset,
            self.state.code, out, num_blocks, row_blocks, out.stride(0),
            BLOCKS=_BLOCKS_A_STEP, REPEATS=_STEPS_A_PROGRAM, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
