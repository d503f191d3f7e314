"""What a block does between its matrix products, each in one launch; in Triton. Arithmetic is float32, rounded once."""

import triton
import triton.language as tl


@triton.jit
def normalize(
    states,  # [outer, inner, width]
    weight,  # [width]
    out,  # like states
    rstd,  # float32 [outer * inner]
    states_outer, states_inner, out_outer, out_inner, inner, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm (arXiv:1910.07467): one program a row."""
    row = tl.program_id(0).to(tl.int64)
    first, second = row // inner, row % inner
    column = tl.arange(0, BLOCK)
    mask = column < width
    values = tl.load(states + first * states_outer + second * states_inner + column, mask=mask, other=0.0)
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(rstd + row, scale)
    result = values * scale * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + first * out_outer + second * out_inner + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def normalize_backward(
    gradient,  # [outer, inner, width], of what the norm gave out
    states,  # like gradient: what it was given
    weight,  # [width]
    rstd,  # float32 [outer * inner]
    out,  # like gradient, written; with ADDS added to
    normalized,  # like gradient, written with REPEATS: what the norm gave out
    gradient_outer, gradient_inner, states_outer, states_inner, out_outer, out_inner, normalized_outer,
    normalized_inner, inner, width,
    ADDS: tl.constexpr, REPEATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reverse RMSNorm: dx = rstd (w dy - n mean(w dy n)) with n = x rstd; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    first, second = row // inner, row % inner
    column = tl.arange(0, BLOCK)
    mask = column < width
    scale = tl.load(rstd + row)
    values = tl.load(states + first * states_outer + second * states_inner + column, mask=mask, other=0.0)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + first * gradient_outer + second * gradient_inner + column, mask=mask, other=0.0)
    normal = values.to(tl.float32) * scale
    inward = upstream.to(tl.float32) * factor
    result = scale * (inward - normal * (tl.sum(inward * normal, 0) / width))
    place = out + first * out_outer + second * out_inner + column
    if ADDS:
        result += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, result.to(out.dtype.element_ty), mask=mask)
    if REPEATS:
        again = normalized + first * normalized_outer + second * normalized_inner + column
        tl.store(again, (normal * factor).to(normalized.dtype.element_ty), mask=mask)


@triton.jit
def rotate(
    states,  # [tokens, heads, 2 * half]
    cosines,  # [tokens, half]
    sines,  # the same
    out,  # like states; may be states
    states_token, states_head, out_token, out_head, table_token, num_heads,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Turn pairs of numbers by their position's angle (RoPE, arXiv:2104.09864); HEADS heads of a token a program."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    mask = (head < num_heads) & (column < HALF)
    source = states + token * states_token + head * states_head + column
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + token * table_token + column).to(tl.float32)
    sine = tl.load(sines + token * table_token + column).to(tl.float32)
    target = out + token * out_token + head * out_head + column
    tl.store(target, (first * cosine - second * sine).to(out.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (second * cosine + first * sine).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _turn_back(source, target, cosine, sine, mask, column, HALF: tl.constexpr):
    first = tl.load(source + column, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + column, mask=mask, other=0.0).to(tl.float32)
    kind: tl.constexpr = target.dtype.element_ty
    tl.store(target + column, (first * cosine + second * sine).to(kind), mask=mask)
    tl.store(target + HALF + column, (second * cosine - first * sine).to(kind), mask=mask)


@triton.jit
def rotate_back(
    queries,  # [tokens, num_heads, 2 * half]
    keys,  # [tokens, num_kv_heads, 2 * half]
    values,  # the same
    cosines,  # [tokens, half]
    sines,  # the same
    out,  # rows of queries, keys and values side by side
    queries_token, queries_head, keys_token, keys_head, values_token, values_head, out_token, table_token, num_heads,
    num_kv_heads,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Turn queries and keys the other way and lay values beside them; HEADS heads of a token a program."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    cosine = tl.load(cosines + token * table_token + column).to(tl.float32)
    sine = tl.load(sines + token * table_token + column).to(tl.float32)
    target = out + token * out_token + head * (2 * HALF)
    is_query = (head < num_heads) & (column < HALF)
    _turn_back(queries + token * queries_token + head * queries_head, target, cosine, sine, is_query, column, HALF)
    own = head - num_heads
    is_key = (own >= 0) & (own < num_kv_heads) & (column < HALF)
    _turn_back(keys + token * keys_token + own * keys_head, target, cosine, sine, is_key, column, HALF)
    own = own - num_kv_heads
    is_value = (own >= 0) & (own < num_kv_heads) & (column < HALF)
    source = values + token * values_token + own * values_head + column
    tl.store(target + column, tl.load(source, mask=is_value, other=0.0), mask=is_value)
    tl.store(target + HALF + column, tl.load(source + HALF, mask=is_value, other=0.0), mask=is_value)


@triton.jit
def gate(
    gate_up,  # [tokens, 2 * width]: gate, then up
    out,  # [tokens, width]
    gate_up_token, out_token, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute silu(gate) * up (SwiGLU, arXiv:2002.05202)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    source = gate_up + token * gate_up_token + column
    opened = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)
    result = opened * tl.sigmoid(opened) * values
    tl.store(out + token * out_token + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward(
    gate_up,  # [tokens, 2 * width]
    gradient,  # [tokens, width]
    out,  # [tokens, 2 * width]: the gradients at gate and up
    gated,  # [tokens, width]: silu(gate) * up once more
    gate_up_token, gradient_token, out_token, gated_token, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reverse SwiGLU: d gate = dy up s (1 + gate (1 - s)) and d up = dy gate s, with s the sigmoid of gate."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    source = gate_up + token * gate_up_token + column
    opened = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + token * gradient_token + column, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(opened)
    activated = opened * share
    target = out + token * out_token + column
    to_gate = upstream * values * share * (1.0 + opened * (1.0 - share))
    tl.store(target, to_gate.to(out.dtype.element_ty), mask=mask)
    tl.store(target + width, (upstream * activated).to(out.dtype.element_ty), mask=mask)
    tl.store(gated + token * gated_token + column, (activated * values).to(gated.dtype.element_ty), mask=mask)


@triton.jit
def cross_entropy(
    logits,  # [rows, vocab_size], overwritten by the gradient of the loss
    labels,  # int64 [rows]
    losses,  # float32 [rows]
    logits_row, vocab_size,
    WRITES_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of a row, log(sum(exp(z))) - z[label], and its gradient, softmax(z) - onehot(label); one program a row."""
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * logits_row
    label = tl.load(labels + row)
    column = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        values = tl.load(source + start + column, mask=start + column < vocab_size, other=float("-inf"))
        values = values.to(tl.float32)
        higher = tl.maximum(largest, values)
        # A lane that has seen nothing yet holds -inf twice, whose difference is no number.
        kept = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - higher))
        total = total * kept + tl.where(values == float("-inf"), 0.0, tl.exp(values - higher))
        largest = higher
    top = tl.max(largest, 0)
    whole = tl.sum(tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - top)), 0)
    chosen = tl.load(source + label).to(tl.float32)
    tl.store(losses + row, tl.log(whole) + top - chosen)
    if WRITES_GRADIENT:
        for start in range(0, vocab_size, BLOCK):
            place = start + column
            mask = place < vocab_size
            values = tl.load(source + place, mask=mask, other=float("-inf")).to(tl.float32)
            share = tl.exp(values - top) / whole - tl.where(place == label, 1.0, 0.0)
            tl.store(source + place, share.to(logits.dtype.element_ty), mask=mask)
