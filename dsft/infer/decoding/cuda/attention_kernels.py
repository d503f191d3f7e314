"""Attention of single tokens to long caches, the keys in parts that many programs read at once; in Triton.

As in Flash-Decoding: each part gives its own softmax with its largest score and its sum, and the parts are weighted by
those.
"""

import triton
import triton.language as tl


@triton.jit
def attend_to_parts(
    queries,  # [T, num_heads, SIZE]
    keys,  # [num_slots, num_kv_heads, capacity, SIZE]
    values,
    positions,  # int32 [T]: a token sees the keys up to its own
    slots,  # int32 [T]
    partial,  # float32 [T, num_heads, num_parts, SIZE], written
    maxima,  # float32 [T, num_heads, num_parts], written
    sums,
    scaling,
    num_heads,
    num_kv_heads,
    capacity,
    NUM_PARTS: tl.constexpr,
    NUM_GROUPED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Attend with the heads that share a key head, to one part of the keys."""
    token = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    num_keys = tl.load(positions + token) + 1
    slot = tl.load(slots + token).to(tl.int64)
    part_size = tl.cdiv(num_keys, NUM_PARTS * BLOCK_K) * BLOCK_K
    first_key = part * part_size
    last_key = tl.minimum(first_key + part_size, num_keys)
    start = (slot * num_kv_heads + kv_head) * capacity * SIZE
    grouped = tl.arange(0, BLOCK_G)
    column = tl.arange(0, SIZE)
    in_group = grouped < NUM_GROUPED
    head = token * num_heads + kv_head * NUM_GROUPED + grouped
    query = tl.load(queries + head[:, None] * SIZE + column[None, :], mask=in_group[:, None], other=0.0)
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, SIZE], tl.float32)
    for first in range(first_key, last_key, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        in_keys = places < last_key
        key = tl.load(keys + start + places[None, :] * SIZE + column[:, None], mask=in_keys[None, :], other=0.0)
        scores = tl.where(in_keys[None, :], tl.dot(query, key) * scaling, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shares = tl.exp(scores - new_largest[:, None])
        kept = tl.exp(largest - new_largest)
        total = total * kept + tl.sum(shares, 1)
        value = tl.load(values + start + places[:, None] * SIZE + column[None, :], mask=in_keys[:, None], other=0.0)
        mixed = tl.dot(shares.to(value.dtype), value, mixed * kept[:, None])
        largest = new_largest
    place = head * NUM_PARTS + part
    tl.store(maxima + place, largest, mask=in_group)
    tl.store(sums + place, total, mask=in_group)
    tl.store(partial + place[:, None] * SIZE + column[None, :], mixed, mask=in_group[:, None])


@triton.jit
def join_parts(
    partial,
    maxima,
    sums,
    out,  # [T, num_heads, SIZE]
    num_heads,
    NUM_PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Add the parts up: one program a token and head."""
    place = tl.program_id(0) * num_heads + tl.program_id(1)
    part = tl.arange(0, NUM_PARTS)
    column = tl.arange(0, SIZE)
    largest = tl.load(maxima + place * NUM_PARTS + part)
    weights = tl.exp(largest - tl.max(largest, 0))  # 0 for a part without keys
    total = tl.sum(weights * tl.load(sums + place * NUM_PARTS + part), 0)
    mixed = tl.load(partial + (place * NUM_PARTS + part[:, None]) * SIZE + column[None, :])
    result = tl.sum(mixed * weights[:, None], 0) / total
    tl.store(out + place * SIZE + column, result.to(out.dtype.element_ty))
