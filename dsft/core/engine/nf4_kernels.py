"""NF4 weights as 16-bit ones in a buffer, with LoRA's factors beside or below them, in one launch; in Triton.

A weight is a value of a code times the scale of its block of 64, itself kept in 8 bits (QLoRA, arXiv:2305.14314,
section 3). All is computed in float32 and rounded as bitsandbytes rounds it, so that the result is its result bit for
bit; the launches must therefore not fuse products and sums.
"""

import triton
import triton.language as tl


@triton.jit
def _dequantize(
    packed, scales, scale_code, group_scales, group_offsets, code, out, program, num_blocks, row_values,
    ROW_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """Write BLOCKS * REPEATS blocks of 64 weights."""
    first = program * (BLOCKS * REPEATS)
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
def _place_beside(
    factors, out, program, num_rows, row_values, width, rank, second_row, third_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each layer's B, [rows, rank], into columns of its own behind some rows, and zeros beside it."""
    row = program * ROWS + tl.arange(0, ROWS)
    layer = (row >= second_row).to(tl.int32) + (row >= third_row).to(tl.int32)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows)[:, None] & (column < width)
    own = column - (layer * rank)[:, None]
    values = tl.load(factors + row[:, None] * rank + own, mask=mask & (own >= 0) & (own < rank), other=0.0)
    tl.store(out + row[:, None] * row_values + (row_values - width) + column, values, mask=mask)


@triton.jit
def extend(
    packed,  # int32 [num_blocks, 8]: eight weights a word, the first in the upper half of the first byte
    scales,  # uint8 [num_blocks]
    scale_code,  # float32 [256]
    group_scales,  # float32 [num_blocks / 256]
    group_offsets,  # float32 [num_blocks / 256]
    code,  # float32 [16]
    out,  # rows of `row_values`, the first ROW_BLOCKS * 64 of each written
    factors,  # in the type of out: B, [num_rows, rank], or A, [values]
    num_blocks, row_values, num_rows, num_programs, width, rank, second_row, third_row, num_values,
    ROW_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, REPEATS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Write weights, and what SIDE says: 0 nothing, 1 B beside the rows, 2 A below them.

    The first `num_programs` programs write weights, the others ROWS rows of B or VALUES values of A each.
    """
    program = tl.program_id(0)
    if program < num_programs:
        _dequantize(
            packed, scales, scale_code, group_scales, group_offsets, code, out, program, num_blocks, row_values,
            ROW_BLOCKS, BLOCKS, REPEATS,
        )  # fmt: skip
    else:
        if SIDE == 1:
            _place_beside(
                factors, out, program - num_programs, num_rows, row_values, width, rank, second_row, third_row, ROWS,
                COLUMNS,
            )  # fmt: skip
        if SIDE == 2:
            place = (program - num_programs) * VALUES + tl.arange(0, VALUES)
            mask = place < num_values
            tl.store(out + num_rows * row_values + place, tl.load(factors + place, mask=mask), mask=mask)
