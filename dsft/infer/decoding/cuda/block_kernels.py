"""What a block does between its products, each in one launch for all tokens of a pass; in Triton.

Sums of products come as float32 parts, [num_parts, T, N], or whole as 16-bit numbers (one part). Results are rounded
where transformers' modules round theirs, so that both paths differ by the order of sums; only an adapter's factors are
rounded to the model's type, as autocast rounds them in training.
"""

import triton
import triton.language as tl


@triton.jit
def _sum_parts(parts, place, mask, stride, NUM_PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """Return a product as the layer gives it out: summed, rounded to DTYPE, as float32."""
    total = tl.load(parts + place, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(parts + part * stride + place, mask=mask, other=0.0).to(tl.float32)
    return total.to(DTYPE).to(tl.float32)


@triton.jit
def _add_update(
    total, lowered, rows_b, token, rows, in_rows, first_rank, num_ranks, lowered_stride,
    RANK: tl.constexpr, NUM_PARTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add B (A x) to a layer's product, B already scaled; LoRA (arXiv:2106.09685)."""
    ranks = tl.arange(0, RANK)
    inner = tl.zeros([RANK], tl.float32)
    for part in tl.static_range(NUM_PARTS):
        inner += tl.load(lowered + part * lowered_stride + token * num_ranks + first_rank + ranks).to(tl.float32)
    weights = tl.load(rows_b + rows[:, None] * RANK + ranks[None, :], mask=in_rows[:, None], other=0.0)
    return (total + tl.sum(weights.to(tl.float32) * inner[None, :], 1)).to(DTYPE).to(tl.float32)


@triton.jit
def add_and_normalize(
    residual,  # [T, hidden], changed where there is something to add
    parts,
    weight,  # [hidden]
    out,  # [T, hidden]
    stride,
    eps,
    hidden_size,
    HAS_DELTA: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a layer's result to the residual stream and normalize it (RMSNorm, arXiv:1910.07467): one program a token."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < hidden_size
    place = token * hidden_size + column
    states = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        states = (states + _sum_parts(parts, place, mask, stride, NUM_PARTS, DTYPE)).to(DTYPE).to(tl.float32)
        tl.store(residual + place, states.to(DTYPE), mask=mask)
    variance = tl.sum(states * states, 0) / hidden_size
    normalized = (states * tl.rsqrt(variance + eps)).to(DTYPE).to(tl.float32)
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (scale * normalized).to(DTYPE), mask=mask)


@triton.jit
def add_updated(
    residual,  # [T, hidden], changed
    parts,
    lowered,  # A x, [num_parts, T, num_ranks]
    rows_b,  # [hidden, RANK]
    stride,
    lowered_stride,
    hidden_size,
    num_ranks,
    NUM_PARTS: tl.constexpr,
    NUM_LOWERED_PARTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the result of a layer with an adapter to the residual stream."""
    DTYPE: tl.constexpr = residual.dtype.element_ty
    token = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < hidden_size
    place = token * hidden_size + rows
    total = _sum_parts(parts, place, mask, stride, NUM_PARTS, DTYPE)
    total = _add_update(
        total, lowered, rows_b, token, rows, mask, 0, num_ranks, lowered_stride, RANK, NUM_LOWERED_PARTS, DTYPE
    )
    states = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual + place, (states + total).to(DTYPE), mask=mask)


@triton.jit
def _read_half(
    parts, lowered, rows_b, token, rows, part_index, stride, lowered_stride, num_rows, num_ranks,
    NUM_PARTS: tl.constexpr, NUM_LOWERED_PARTS: tl.constexpr, RANK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return some numbers of a head."""
    whole = rows < num_rows
    total = _sum_parts(parts, token * num_rows + rows, whole, stride, NUM_PARTS, DTYPE)
    if RANK > 0:
        total = _add_update(
            total, lowered, rows_b, token, rows, whole, part_index * RANK, num_ranks, lowered_stride, RANK,
            NUM_LOWERED_PARTS, DTYPE,
        )  # fmt: skip
    return total


@triton.jit
def _turn(own, partner, cosine, sine, DTYPE: tl.constexpr):
    kept = (own * cosine).to(DTYPE).to(tl.float32)
    turned = (partner * sine).to(DTYPE).to(tl.float32)
    return (kept + turned).to(DTYPE)


@triton.jit
def rotate_and_store(
    parts,  # queries, keys, values: [num_parts, T, (num_heads + 2 num_kv_heads) SIZE]
    lowered,
    rows_b,  # [(num_heads + 2 num_kv_heads) SIZE, RANK]
    cosines,  # [num_positions, SIZE]
    sines,
    positions,  # int32 [T]
    slots,  # int32 [T]
    query_weight,  # [SIZE], norm of each head
    key_weight,
    queries,  # [T, num_heads, SIZE], written
    keys,  # [num_slots, num_kv_heads, capacity, SIZE], written at the tokens' positions
    values,
    stride,
    lowered_stride,
    eps,
    num_heads,
    num_kv_heads,
    capacity,
    num_ranks,
    HAS_NORM: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_LOWERED_PARTS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Rotate queries and keys (RoPE, arXiv:2104.09864) and put keys and values into the cache.

    A program takes CHUNK numbers of the lower half of a head and their partners in the upper one; with a norm all.
    """
    DTYPE: tl.constexpr = queries.dtype.element_ty
    head = tl.program_id(0)
    token = tl.program_id(1)
    num_rows = (num_heads + 2 * num_kv_heads) * SIZE
    part_index = (head >= num_heads).to(tl.int32) + (head >= num_heads + num_kv_heads).to(tl.int32)
    column = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    position = tl.load(positions + token)
    slot = tl.load(slots + token).to(tl.int64)
    low = _read_half(
        parts, lowered, rows_b, token, head * SIZE + column, part_index, stride, lowered_stride, num_rows, num_ranks,
        NUM_PARTS, NUM_LOWERED_PARTS, RANK, DTYPE,
    )  # fmt: skip
    high = _read_half(
        parts, lowered, rows_b, token, head * SIZE + SIZE // 2 + column, part_index, stride, lowered_stride, num_rows,
        num_ranks, NUM_PARTS, NUM_LOWERED_PARTS, RANK, DTYPE,
    )  # fmt: skip
    kv_head = tl.where(part_index == 2, head - num_heads - num_kv_heads, head - num_heads)
    cache_place = ((slot * num_kv_heads + kv_head) * capacity + position) * SIZE + column
    if part_index == 2:
        tl.store(values + cache_place, low.to(DTYPE))
        tl.store(values + cache_place + SIZE // 2, high.to(DTYPE))
    else:
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / SIZE + eps)
            weight = query_weight if part_index == 0 else key_weight
            low_weight = tl.load(weight + column).to(tl.float32)
            high_weight = tl.load(weight + SIZE // 2 + column).to(tl.float32)
            low = (low_weight * (low * scale).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
            high = (high_weight * (high * scale).to(DTYPE).to(tl.float32)).to(DTYPE).to(tl.float32)
        angle = position * SIZE + column
        new_low = _turn(
            low, -high, tl.load(cosines + angle).to(tl.float32), tl.load(sines + angle).to(tl.float32), DTYPE
        )
        angle += SIZE // 2
        new_high = _turn(
            high, low, tl.load(cosines + angle).to(tl.float32), tl.load(sines + angle).to(tl.float32), DTYPE
        )
        if part_index == 0:
            place = (token * num_heads + head) * SIZE + column
            tl.store(queries + place, new_low)
            tl.store(queries + place + SIZE // 2, new_high)
        else:
            tl.store(keys + cache_place, new_low)
            tl.store(keys + cache_place + SIZE // 2, new_high)


@triton.jit
def gate(
    parts,  # gate and up: [num_parts, T, 2 width]
    lowered,
    rows_b,  # [2 width, RANK]
    out,  # [T, width]
    stride,
    lowered_stride,
    width,
    num_ranks,
    NUM_PARTS: tl.constexpr,
    NUM_LOWERED_PARTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute silu(gate) * up (SwiGLU, arXiv:2002.05202)."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < width
    place = token * 2 * width + rows
    gated = _sum_parts(parts, place, mask, stride, NUM_PARTS, DTYPE)
    upper = _sum_parts(parts, place + width, mask, stride, NUM_PARTS, DTYPE)
    if RANK > 0:
        gated = _add_update(
            gated, lowered, rows_b, token, rows, mask, 0, num_ranks, lowered_stride, RANK, NUM_LOWERED_PARTS, DTYPE
        )
        upper = _add_update(
            upper, lowered, rows_b, token, rows + width, mask, RANK, num_ranks, lowered_stride, RANK,
            NUM_LOWERED_PARTS, DTYPE,
        )  # fmt: skip
    activated = (gated / (1.0 + tl.exp(-gated))).to(DTYPE).to(tl.float32)
    tl.store(out + token * width + rows, (activated * upper).to(DTYPE), mask=mask)
