"""Products with NF4 weights for one to a few dozen tokens, unpacked on the way into the sum; in Triton.

The weights lie as bitsandbytes writes them: rows of K / 2 bytes, the first weight of a byte in its upper half, a scale
of 8 bits for each 64 weights, and for each 256 of those a scale and an offset in float32 (QLoRA, arXiv:2305.14314,
section 3). Rows of 16-bit weights, LoRA's A, may be appended to the same launch, so that both read the input at once.
"""

import numpy as np
import triton
import triton.language as tl

BLOCK = tl.constexpr(64)
HALF = tl.constexpr(32)
GROUP = tl.constexpr(256)

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen values of NF4 (QLoRA, appendix E)."""


def _write_unpacking() -> str:
    """Return PTX that turns four bytes ($4) into the float16 values of their upper ($0, $1) and lower halves ($2, $3).

    A byte permutation looks up four values at once among eight, so each half of the table has one register of upper and
    one of lower bytes for each four entries; the top bit of a half byte, spread over a byte by the same instruction,
    chooses between the two halves. float16 keeps the values within 2^-12, an eighth of what bfloat16 rounds weights by.
    """
    halves = np.array(NF4_CODE, dtype=np.float16).view(np.uint16)
    upper, lower = (
        [int.from_bytes(part[i : i + 4].tobytes(), "little") for i in range(0, 16, 4)]
        for part in ((halves >> 8).astype(np.uint8), (halves & 255).astype(np.uint8))
    )
    lines = ["{", ".reg .b32 half, shifted, chosen, mask, a, b, upper, lower;", "shl.b32 shifted, $4, 4;"]
    for source, spread, first, second in (("$4", "0xD9C8", "$0", "$2"), ("half", "0xFBEA", "$1", "$3")):
        if source == "half":
            lines.append("shr.u32 half, $4, 16;")
        lines += [f"and.b32 chosen, {source}, 0x7777;", f"prmt.b32 mask, shifted, $4, {spread};"]
        for name, table in (("upper", upper), ("lower", lower)):
            lines += [
                f"prmt.b32 a, {table[0]:#010x}, {table[1]:#010x}, chosen;",
                f"prmt.b32 b, {table[2]:#010x}, {table[3]:#010x}, chosen;",
                f"lop3.b32 {name}, mask, b, a, 0xCA;",
            ]
        lines += [f"prmt.b32 {first}, lower, upper, 0x7351;", f"prmt.b32 {second}, lower, upper, 0x6240;"]
    return "\n".join([*lines, "}"])


_UNPACKING = tl.constexpr(_write_unpacking())


@triton.jit
def _unpack(pair):
    """Return the first and the second weights of bytes, float16, without their scale."""
    return tl.inline_asm_elementwise(
        _UNPACKING, "=&r,=&r,=&r,=&r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
    )


@triton.jit
def _split(words, DTYPE: tl.constexpr):
    """Return the first and the second 16-bit numbers of words, as float32."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300  # the compiler wants the constant first
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    first = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    second = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _read_scales(scales, scale_code, group_scales, group_offsets, index, mask):
    """Return the scales of blocks, float32, in the shape of `index`."""
    coded = tl.load(scales + index, mask=mask, other=0).to(tl.int32)
    group = index // GROUP
    scale = tl.load(group_scales + group, mask=mask, other=0.0)
    offset = tl.load(group_offsets + group, mask=mask, other=0.0)
    return tl.load(scale_code + coded) * scale + offset


@triton.jit
def _multiply_nf4_one(
    states, packed, scales, scale_code, group_scales, group_offsets, rows, in_rows, first_block, last_block,
    K: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_N], tl.float32)
    column = tl.arange(0, HALF)
    for first in tl.range(first_block, last_block, BLOCK_B, num_stages=STAGES):
        blocks = first + tl.arange(0, BLOCK_B)
        in_blocks = blocks < last_block
        where = in_rows[:, None] & in_blocks[None, :]
        index = rows[:, None] * (K // BLOCK) + blocks[None, :]
        pair = tl.load(
            packed + index[:, :, None] * HALF + column[None, None, :],
            mask=where[:, :, None],
            other=0,
            eviction_policy="evict_first",
        )
        words = tl.load(states + blocks[:, None] * HALF + column[None, :], mask=in_blocks[:, None], other=0)
        first_states, second_states = _split(words, DTYPE)
        first_weights, second_weights = _unpack(pair)
        product = first_weights.to(tl.float32) * first_states[None, :, :]
        product += second_weights.to(tl.float32) * second_states[None, :, :]
        scale = _read_scales(scales, scale_code, group_scales, group_offsets, index, where)
        total += tl.sum(tl.sum(product, 2) * scale, 1)
    return total


@triton.jit
def _multiply_plain_one(
    states, weights, rows, in_rows, first_word, last_word,
    K: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in tl.range(first_word, last_word, BLOCK_W, num_stages=STAGES):
        places = first + tl.arange(0, BLOCK_W)
        in_places = places < last_word
        where = in_rows[:, None] & in_places[None, :]
        words = tl.load(weights + rows[:, None] * (K // 2) + places[None, :], mask=where, other=0)
        first_weights, second_weights = _split(words, DTYPE)
        first_states, second_states = _split(tl.load(states + places, mask=in_places, other=0), DTYPE)
        total += tl.sum(first_weights * first_states[None, :] + second_weights * second_states[None, :], 1)
    return total


@triton.jit
def multiply_one(
    states,  # int32 [K / 2]: pairs of 16-bit numbers
    packed,  # uint8 [N, K / 2]
    scales,  # uint8 [N * K / 64]
    scale_code,  # float32 [256]
    group_scales,  # float32 [N * K / 64 / 256]
    group_offsets,  # the same
    out,  # float32 [NUM_SPLITS, out_width], N of them written
    rows_a,  # int32 [R, K / 2]
    out_a,  # float32 [NUM_SPLITS, R]
    num_rows,
    num_rows_a,
    out_width,
    K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute W x and A x of one token, in parts of K: BLOCK_N rows a program, BLOCK_B blocks of 64 weights a turn."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    num_blocks: tl.constexpr = (K // BLOCK + NUM_SPLITS - 1) // NUM_SPLITS
    first_block = split * num_blocks
    last_block = tl.minimum(first_block + num_blocks, K // BLOCK)
    num_programs = tl.cdiv(num_rows, BLOCK_N)
    if program < num_programs:
        rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
        total = _multiply_nf4_one(
            states, packed, scales, scale_code, group_scales, group_offsets, rows, rows < num_rows, first_block,
            last_block, K, DTYPE, BLOCK_N, BLOCK_B, STAGES,
        )  # fmt: skip
        tl.store(out + split * out_width + rows, total, mask=rows < num_rows)
    else:
        rows = (program - num_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = _multiply_plain_one(
            states, rows_a, rows, rows < num_rows_a, first_block * HALF, last_block * HALF, K, DTYPE, BLOCK_N,
            BLOCK_B * HALF, STAGES,
        )  # fmt: skip
        tl.store(out_a + split * num_rows_a + rows, total, mask=rows < num_rows_a)


@triton.jit
def _pair_states(states, tokens, in_tokens, places, in_places, K: tl.constexpr, DTYPE: tl.constexpr):
    words = tl.load(
        states + tokens[None, :] * (K // 2) + places[:, None], mask=in_places[:, None] & in_tokens[None, :], other=0
    )
    return (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True), (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _multiply_nf4_few(
    states, packed, scales, scale_code, group_scales, group_offsets, rows, in_rows, tokens, in_tokens, first_block,
    last_block, K: tl.constexpr, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    column = tl.arange(0, BLOCK_B * HALF)
    for first in tl.range(first_block, last_block, BLOCK_B, num_stages=STAGES):
        blocks = first + tl.arange(0, BLOCK_B)
        where = in_rows[:, None] & (blocks < last_block)[None, :]
        index = rows[:, None] * (K // BLOCK) + blocks[None, :]
        scale = _read_scales(scales, scale_code, group_scales, group_offsets, index, where)
        spread = tl.reshape(tl.broadcast_to(scale[:, :, None], [BLOCK_N, BLOCK_B, HALF]), [BLOCK_N, BLOCK_B * HALF])
        places = first * HALF + column
        in_places = places < last_block * HALF
        pair = tl.load(
            packed + rows[:, None] * (K // 2) + places[None, :],
            mask=in_rows[:, None] & in_places[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        first_states, second_states = _pair_states(states, tokens, in_tokens, places, in_places, K, DTYPE)
        first_weights, second_weights = _unpack(pair)
        total = tl.dot((first_weights.to(tl.float32) * spread).to(DTYPE), first_states, total)
        total = tl.dot((second_weights.to(tl.float32) * spread).to(DTYPE), second_states, total)
    return total


@triton.jit
def _multiply_plain_few(
    states, weights, rows, in_rows, tokens, in_tokens, first_word, last_word, K: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    for first in tl.range(first_word, last_word, BLOCK_W, num_stages=STAGES):
        places = first + tl.arange(0, BLOCK_W)
        in_places = places < last_word
        where = in_rows[:, None] & in_places[None, :]
        words = tl.load(weights + rows[:, None] * (K // 2) + places[None, :], mask=where, other=0)
        first_weights = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        second_weights = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        first_states, second_states = _pair_states(states, tokens, in_tokens, places, in_places, K, DTYPE)
        total = tl.dot(first_weights, first_states, total)
        total = tl.dot(second_weights, second_states, total)
    return total


@triton.jit
def multiply_few(
    states,  # int32 [T, K / 2]: pairs of 16-bit numbers
    packed,
    scales,
    scale_code,
    group_scales,
    group_offsets,
    out,  # float32 [NUM_SPLITS, T, out_width], N of each row written
    rows_a,  # int32 [R, K / 2]
    out_a,  # float32 [NUM_SPLITS, T, R]
    num_tokens,
    num_rows,
    num_rows_a,
    out_width,
    K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute x Wᵀ and x Aᵀ of a few tokens by matrix units, in parts of K: BLOCK_N rows, BLOCK_T tokens a program."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    tokens = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_tokens = tokens < num_tokens
    num_blocks: tl.constexpr = (K // BLOCK + NUM_SPLITS - 1) // NUM_SPLITS
    first_block = split * num_blocks
    last_block = tl.minimum(first_block + num_blocks, K // BLOCK)
    num_programs = tl.cdiv(num_rows, BLOCK_N)
    place = split * num_tokens + tokens[None, :]
    if program < num_programs:
        rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = rows < num_rows
        total = _multiply_nf4_few(
            states, packed, scales, scale_code, group_scales, group_offsets, rows, in_rows, tokens, in_tokens,
            first_block, last_block, K, DTYPE, BLOCK_T, BLOCK_N, BLOCK_B, STAGES,
        )  # fmt: skip
        tl.store(out + place * out_width + rows[:, None], total, mask=in_rows[:, None] & in_tokens[None, :])
    else:
        rows = (program - num_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = rows < num_rows_a
        total = _multiply_plain_few(
            states, rows_a, rows, in_rows, tokens, in_tokens, first_block * HALF, last_block * HALF, K, DTYPE, BLOCK_T,
            BLOCK_N, BLOCK_B * HALF, STAGES,
        )  # fmt: skip
        tl.store(out_a + place * num_rows_a + rows[:, None], total, mask=in_rows[:, None] & in_tokens[None, :])


@triton.jit
def unpack_weights(
    packed,  # uint8 [N, K / 2]
    scales,
    scale_code,
    group_scales,
    group_offsets,
    code,  # float32 [16]
    out,  # [N, K], written
    num_bytes,
    BLOCK_BYTES: tl.constexpr,
):
    """Write weights out, exactly as bitsandbytes does: value times scale in float32, rounded once."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    mask = place < num_bytes
    pair = tl.load(packed + place, mask=mask, other=0).to(tl.int32)
    scale = _read_scales(scales, scale_code, group_scales, group_offsets, place // HALF, mask)
    weights = tl.interleave(tl.load(code + (pair >> 4)) * scale, tl.load(code + (pair & 15)) * scale)
    where = tl.program_id(0).to(tl.int64) * BLOCK_BYTES * 2 + tl.arange(0, BLOCK_BYTES * 2)
    tl.store(out + where, weights.to(out.dtype.element_ty), mask=where < num_bytes * 2)
