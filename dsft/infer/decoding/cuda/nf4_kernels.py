"""Products with NF4 weights for one to a few dozen tokens, unpacked on the way into the sum; in Triton.

The weights lie as bitsandbytes writes them: rows of K / 2 bytes, the first weight of a byte in its upper half, a scale
of 8 bits for each 64 weights, and for each 256 of those a scale and an offset in float32 (QLoRA, arXiv:2305.14314,
section 3). Rows of 16-bit weights, LoRA's A, may be appended to the same launch, so that both read the input at once.
"""

import triton
import triton.language as tl

from dsft.infer.decoding.cuda.nf4_look_up import write_inner_product, write_unpacking

BLOCK = tl.constexpr(64)
HALF = tl.constexpr(32)
GROUP = tl.constexpr(256)

ROWS_A = 4
"""Rows of A that a program of `multiply_one` takes."""

_ROWS_A = tl.constexpr(ROWS_A)

_UNPACKING = tl.constexpr(write_unpacking())
_INNER_PRODUCT = tl.constexpr(write_inner_product())


@triton.jit
def _unpack(pair):
    """Return the first and the second weights of bytes, float16, without their scale."""
    return tl.inline_asm_elementwise(
        _UNPACKING, "=&r,=&r,=&r,=&r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
    )


@triton.jit
def _multiply_words(packed, first, second, third, fourth, t0, t1, t2, t3, t4, t5, t6, t7):
    """Return the sums of eight weights each, without their scale, times eight numbers; float32."""
    return tl.inline_asm_elementwise(
        _INNER_PRODUCT,
        "=&f,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [packed, first, second, third, fourth, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
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
def _read_halves(states, places, mask, DTYPE: tl.constexpr):
    """Return pairs of numbers as float32."""
    return _split(tl.load(states + places, mask=mask, other=0), DTYPE)


@triton.jit
def _scale_pairs(first, second, factor):
    """Return pairs of numbers times a factor as two float16 in a word."""
    low = (first * factor).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = (second * factor).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return low | high


@triton.jit
def _multiply_nf4_one(
    states, packed, scales, scale_code, group_scales, group_offsets, out, t0, t1, t2, t3, t4, t5, t6, t7, first_row,
    num_rows, first_vector, K: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """Write the sums of a stretch of K for some rows; each lane keeps its numbers of the token for all of them.

    The numbers are float16, scaled by a power of two so that the largest is near 4096: what is below 2^-36 of it is
    lost, and a sum of four products, made in float16, is as exact as one of bfloat16 weights.
    """
    # Dimensions are lane, row, vector, word: in this order the compiler gives lanes neighbouring memory.
    lane = first_vector + tl.arange(0, VECTORS)[None, None, :, None] * 32 + tl.arange(0, 32)[:, None, None, None]
    word = tl.arange(0, 4)[None, None, None, :]
    in_lane = lane < K // HALF
    sixteen = tl.arange(0, 16)[None, None, None, :]
    all_words = tl.load(states + lane * 16 + sixteen, mask=in_lane & (sixteen < 16), other=0)
    # Of the sixteen words of a vector each four belong to one of packed weights: 4 j + 2 i + h.
    even, odd = tl.split(tl.reshape(all_words, [32, 1, VECTORS, 4, 2, 2]))
    words0, words2 = tl.split(even)
    words1, words3 = tl.split(odd)
    a0, b0 = _split(words0, DTYPE)
    a1, b1 = _split(words1, DTYPE)
    a2, b2 = _split(words2, DTYPE)
    a3, b3 = _split(words3, DTYPE)
    largest = tl.maximum(tl.maximum(tl.abs(a0), tl.abs(b0)), tl.maximum(tl.abs(a1), tl.abs(b1)))
    largest = tl.maximum(largest, tl.maximum(tl.maximum(tl.abs(a2), tl.abs(b2)), tl.maximum(tl.abs(a3), tl.abs(b3))))
    top = tl.max(tl.max(tl.max(tl.max(largest, 3), 2), 1), 0)
    exponent = tl.floor(tl.log2(tl.maximum(top, 1e-30)))
    factor = tl.exp2(11.0 - exponent)
    inverse = tl.exp2(exponent - 11.0)
    x0 = _scale_pairs(a0, b0, factor)
    x1 = _scale_pairs(a1, b1, factor)
    x2 = _scale_pairs(a2, b2, factor)
    x3 = _scale_pairs(a3, b3, factor)
    vector = first_vector + tl.arange(0, VECTORS)[None, None, :] * 32 + tl.arange(0, 32)[:, None, None]
    for offset in range(0, ROWS, BLOCK_N):
        rows = first_row + offset + tl.arange(0, BLOCK_N)
        in_rows = rows < num_rows
        words = tl.load(
            packed + rows[None, :, None, None] * (K // 8) + lane * 4 + word,
            mask=in_rows[None, :, None, None] & in_lane,
            other=0,
            eviction_policy="evict_first",
        )
        sums = tl.sum(_multiply_words(words, x0, x1, x2, x3, t0, t1, t2, t3, t4, t5, t6, t7), 3)
        where = in_rows[None, :, None] & (vector < K // HALF)
        index = rows[None, :, None] * (K // BLOCK) + vector // 2
        scale = _read_scales(scales, scale_code, group_scales, group_offsets, index, where)
        total = tl.sum(tl.sum(sums * scale, 2), 0)
        tl.store(out + rows, total * inverse, mask=in_rows)


@triton.jit
def _multiply_plain_one(
    states, weights, out, first_row, num_rows, first_word, last_word,
    K: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_R)
    in_rows = rows < num_rows
    total = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for first in tl.range(first_word, last_word, BLOCK_W):
        places = first + tl.arange(0, BLOCK_W)
        in_places = (places < last_word) & (places < K // 2)
        where = in_rows[:, None] & in_places[None, :]
        words = tl.load(weights + rows[:, None] * (K // 2) + places[None, :], mask=where, other=0)
        first_weights, second_weights = _split(words, DTYPE)
        first_states, second_states = _read_halves(states, places, in_places, DTYPE)
        total += first_weights * first_states[None, :] + second_weights * second_states[None, :]
    tl.store(out + rows, tl.sum(total, 1), mask=in_rows)


@triton.jit
def multiply_one(
    states,  # int32 [K / 2]: pairs of 16-bit numbers
    packed,  # int32 [N, K / 8]
    scales,  # uint8 [N * K / 64]
    scale_code,  # float32 [256]
    group_scales,  # float32 [N * K / 64 / 256]
    group_offsets,  # the same
    out,  # float32 [NUM_SPLITS, out_width], N of them written
    rows_a,  # int32 [R, K / 2]
    out_a,  # float32 [NUM_SPLITS, R]
    t0,  # TABLES
    t1,
    t2,
    t3,
    t4,
    t5,
    t6,
    t7,
    num_rows,
    num_rows_a,
    out_width,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Compute W x and A x of one token, in stretches of VECTORS * 1024 of K: ROWS rows a program, BLOCK_N at a time."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    # A first: it takes longest for its bytes, and the rows of W fill up what it leaves idle.
    num_programs_a = tl.cdiv(num_rows_a, _ROWS_A)
    if program < num_programs_a:
        first_word = split * VECTORS * 512
        _multiply_plain_one(
            states, rows_a, out_a + split * num_rows_a, program * _ROWS_A, num_rows_a, first_word,
            first_word + VECTORS * 512, K, DTYPE, _ROWS_A, 256,
        )  # fmt: skip
    else:
        _multiply_nf4_one(
            states, packed, scales, scale_code, group_scales, group_offsets, out + split * out_width, t0, t1, t2, t3,
            t4, t5, t6, t7, (program - num_programs_a) * ROWS, num_rows, split * VECTORS * 32, K, DTYPE, ROWS, BLOCK_N,
            VECTORS,
        )  # fmt: skip


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
