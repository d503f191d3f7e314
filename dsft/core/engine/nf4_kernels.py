"""NF4 weights as 16-bit ones in a buffer, with LoRA's factor beside them; in Triton.

A weight is a value of a code times the scale of its block of 64, itself kept in 8 bits (QLoRA, arXiv:2305.14314,
section 3). All is computed in float32 and rounded as bitsandbytes rounds it, so that the result is its result bit for
bit; the launches must therefore not fuse products and sums.
"""

import triton
import triton.language as tl


@triton.jit
def dequantize(
    packed,  # int32 [num_blocks, 8]: eight weights a word, the first in the upper half of the first byte
    scales,  # uint8 [num_blocks]
    scale_code,  # float32 [256]
    group_scales,  # float32 [num_blocks / 256]
    group_offsets,  # float32 [num_blocks / 256]
    code,  # float32 [16]
    out,  # rows of `row_values`, the first ROW_BLOCKS * 64 of each written
    num_blocks, row_values,
    ROW_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """Write blocks of 64 weights; BLOCKS * REPEATS of them a program."""
    first = tl.program_id(0) * (BLOCKS * REPEATS)
    word = tl.arange(0, 8)
    nibble = tl.arange(0, 8)
    shift = (nibble // 2) * 8 + (1 - nibble % 2) * 4
    for repeat in tl.static_range(REPEATS):
        block = first + repeat * BLOCKS + tl.arange(0, BLOCKS)
        mask = block < num_blocks
        words = tl.load(packed + block[:, None] * 8 + word[None, :], mask=mask[:, None], other=0)
        coded = tl.load(scales + block, mask=mask, other=0).to(tl.int32)
        group = block // 256
        scale = tl.load(scale_code + coded) * tl.load(group_scales + group, mask=mask, other=0.0)
        scale = scale + tl.load(group_offsets + group, mask=mask, other=0.0)
        index = (words[:, :, None] >> shift[None, None, :]) & 15
        values = tl.load(code + index) * scale[:, None, None]
        place = (block // ROW_BLOCKS) * row_values + (block % ROW_BLOCKS) * 64
        where = place[:, None, None] + word[None, :, None] * 8 + nibble[None, None, :]
        tl.store(out + where, values.to(out.dtype.element_ty), mask=mask[:, None, None])


@triton.jit
def place_factors(
    factors,  # [rows, rank]: B of some layers, one below the other
    out,  # rows of `row_values`; the last `width` = layers * rank of each written
    num_rows, row_values, width, rank, second_row, third_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each layer's B into columns of its own, and zeros beside it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = (row >= second_row).to(tl.int32) + (row >= third_row).to(tl.int32)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows)[:, None] & (column < width)
    own = column - (layer * rank)[:, None]
    values = tl.load(factors + row.to(tl.int64)[:, None] * rank + own, mask=mask & (own >= 0) & (own < rank), other=0.0)
    target = out + row.to(tl.int64)[:, None] * row_values + (row_values - width) + column
    tl.store(target, values, mask=mask)
