"""The life of every tensor in a step through transformers' blocks with PEFT's LoRA on bitsandbytes' NF4 layers.

Written down from the code of transformers 5.23, peft 0.21 and bitsandbytes 0.50, and checked against PyTorch's record
of allocations on a GPU (docs/benchmarks/memory.md). T stands for tokens of a micro-batch, h for the hidden size, r for
the rank; sizes are in bytes of the compute type, w (2, or 4 for float32). With a 16-bit type autocast is on, without
its cache: LoRA's float32 weights are cast at each use, and a cast lives as long as something that needs it.
"""

from dataclasses import dataclass
from functools import cache

from dsft.core.memory.loss_chunks import chunk_rows
from dsft.core.memory.model_shape import NF4_BLOCK, Linear, ModelShape, in_blocks
from dsft.core.memory.tape import Tape


@dataclass(frozen=True)
class Segment:
    """What a part of a step adds to the memory it begins with.

    Attributes:
        peak_bytes: Most at once, above the beginning.
        kept_bytes: What it leaves behind, for the backward pass (may be negative: what it frees).
    """

    peak_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class PassSize:
    """The size of one forward and backward pass.

    Attributes:
        num_tokens: Tokens, T.
        num_targets: Tokens that carry loss, at most T.
        rank: LoRA rank, r.
        value_bytes: Bytes of a value in the compute type, w.
        is_flash: Whether a variable-length flash kernel computes attention.
    """

    num_tokens: int
    num_targets: int
    rank: int
    value_bytes: int = 2
    is_flash: bool = True

    @property
    def casts_lora(self) -> bool:
        """Whether LoRA's float32 weights are cast to the compute type."""
        return self.value_bytes < 4


@cache
def block_forward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the forward pass of a block that keeps its activations.

    Kept are, for a token: the float32 inputs of both norms (8·h) and their outputs (2·w·h), rotated queries and keys
    and the values as attention takes them, its output and log-sum-exp, the inputs and outputs of the activation
    function and the gating product (4·w·intermediate), and for each linear layer the rank-r product (w·r); and the
    casts of LoRA's weights. The block's input is not: the float32 copy in the first norm serves. Where there is no such
    copy (float32, LayerNorm, OLMo 2's norms after attention and MLP) the input and the sum in the middle are kept.
    """
    tape = Tape()
    _run_block(tape, shape, size)
    return Segment(tape.peak_bytes, tape.live_bytes)


@cache
def recomputed_forward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the forward pass of a block that recomputes, or of one in a validation pass.

    It keeps only its input (w·T·h), and that for the backward pass alone.
    """
    tape = Tape()
    _run_block(tape, shape, size, keeps=False)
    kept = in_blocks(size.value_bytes * size.num_tokens * shape.hidden_size)
    return Segment(tape.peak_bytes, kept)


@cache
def block_backward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the backward pass of a block whose activations are there; it frees them as it goes."""
    tape = Tape()
    _run_block(tape, shape, size)
    start = tape.live_bytes
    tape.peak_bytes = start
    _reverse_block(tape, shape, size)
    return Segment(tape.peak_bytes - start, -start)


@cache
def recomputed_backward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the backward pass of a block that runs forward once more first."""
    w, values = size.value_bytes, size.num_tokens * shape.hidden_size
    tape = Tape()
    tape.make("incoming gradient", w * values)
    start = tape.live_bytes
    # The backward pass stops where it first needs what was not kept: LoRA's B, or the weight of OLMo 2's last norm.
    if not _has_norms_after(shape):
        tape.make("gradient so far", w * values)
    elif w < 4:
        tape.make("gradient so far", 4 * values)
    _run_block(tape, shape, size)
    tape.drop("incoming gradient")
    tape.drop_if_there("gradient so far")  # both are made once more
    tape.drop_if_there("input")  # what checkpointing kept is the same tensor
    _reverse_block(tape, shape, size)
    return Segment(tape.peak_bytes - start, -in_blocks(w * values))


@cache
def loss_and_head(shape: ModelShape, size: PassSize) -> Segment:
    """Return the final norm, output head and loss, forward and backward, above what all blocks have left.

    The head keeps the gradient at its input (w·targets·h) and needs a chunk of logits, in float32 and beside it in the
    compute type; the backward pass of the norm then needs up to five float32 copies of its input.
    """
    w, tokens, hidden = size.value_bytes, size.num_tokens, shape.hidden_size
    tape = Tape()
    if w >= 4 or shape.family == "starcoder2":
        tape.make("final in", w * tokens * hidden)  # elsewhere it is copied into float32
    _norm(tape, "final", shape, tokens, hidden, w)
    states = w * size.num_targets * hidden
    tape.make("states", states)
    tape.make("gradient at states", states)
    rows = min(chunk_rows(shape.vocab_size), max(size.num_targets, 1))
    tape.make("logits", w * rows * shape.vocab_size)
    if w < 4:
        tape.make("float32 logits", 4 * rows * shape.vocab_size)
        tape.drop("float32 logits")
    tape.drop("logits", "final out", "states")
    tape.make("scaled gradient", states)
    tape.drop("gradient at states")
    tape.make("gradient", w * tokens * hidden)
    tape.make("sorted positions", 6 * 8 * size.num_targets)
    tape.drop("sorted positions", "scaled gradient")
    _reverse_norm(tape, "final", shape, size, hidden, gradient="gradient", result="gradient")
    return Segment(tape.peak_bytes, tape.live_bytes)


# Forward, in the order of transformers' decoder layer


def _run_block(tape: Tape, shape: ModelShape, size: PassSize, *, keeps: bool = True) -> None:
    w, tokens, is_after = size.value_bytes, size.num_tokens, _has_norms_after(shape)
    state = w * tokens * shape.hidden_size
    if not is_after:
        _norm(tape, "norm 1", shape, tokens, shape.hidden_size, w, keeps=keeps)
    for linear in shape.attention_linears:
        _linear(tape, linear, size, keeps=keeps)
        if shape.normalized_head_values and linear.name != "v_proj":
            _norm_heads(tape, shape, linear, size, keeps=keeps)
    _attend(tape, shape, size, keeps=keeps)
    _linear(tape, shape.output_linear, size, keeps=keeps)
    if not keeps:
        tape.drop("q rotated")
        tape.drop_if_there("norm 1 out", "attention out", "joined", "k rotated", "v", "qkv_proj out")
    elif _is_repeated(shape, size):
        tape.drop("k rotated", "v")
        tape.drop_if_there("qkv_proj out")
    added = _norm_result(tape, "norm 1", shape, size, keeps=keeps) if is_after else "o_proj out"
    tape.make("middle", state)
    tape.drop(added)
    if not is_after:
        _norm(tape, "norm 2", shape, tokens, shape.hidden_size, w, keeps=keeps)
    _run_mlp(tape, shape, size, keeps=keeps)
    if not keeps:
        tape.drop_if_there("norm 2 out")
    added = _norm_result(tape, "norm 2", shape, size, keeps=keeps) if is_after else f"{shape.mlp_linears[-1].name} out"
    tape.make("output", state)
    tape.drop(added, "output")
    if not (keeps and _keeps_input(shape, w)):
        tape.drop("middle")
    else:
        tape.make("input", state)  # there from the beginning, and from now on for the backward pass


def _has_norms_after(shape: ModelShape) -> bool:
    return shape.family == "olmo2"


def _is_repeated(shape: ModelShape, size: PassSize) -> bool:
    # The flash kernel gets a key head for each query head.
    return size.is_flash and shape.num_heads > shape.num_kv_heads


def _keeps_input(shape: ModelShape, w: int) -> bool:
    return w >= 4 or shape.family in ("olmo2", "starcoder2")


def _norm(
    tape: Tape, name: str, shape: ModelShape, tokens: int, width: int, w: int, *, num_rows: int = 1, keeps: bool = True
) -> None:
    # Of a token's `width` values, each of `num_rows` parts has a norm of its own.
    values = tokens * width
    if shape.family == "starcoder2":  # one kernel
        tape.make(f"{name} out", w * values)
        tape.make(f"{name} rsqrt", 2 * 4 * tokens)  # and the mean
    else:
        if w < 4:
            tape.make(f"{name} in", 4 * values)
        tape.make("square", 4 * values)
        tape.make(f"{name} rsqrt", 4 * tokens * num_rows)
        tape.drop("square")
        tape.make("normal", 4 * values)
        if not keeps:
            tape.drop_if_there(f"{name} in")
        if w < 4:
            # Multiplied by the weight and rounded, or the other way round.
            tape.make("rounded", (4 if _has_norms_after(shape) else w) * values)
        tape.make(f"{name} out", w * values)
        tape.drop_if_there("rounded", "normal")
    if not keeps:
        tape.drop(f"{name} rsqrt")


def _norm_heads(tape: Tape, shape: ModelShape, linear: Linear, size: PassSize, *, keeps: bool) -> None:
    part, tokens, w = linear.name[0], size.num_tokens, size.value_bytes
    num_rows = 1 if _has_norms_after(shape) else linear.num_outputs // shape.head_dim
    _norm(tape, f"{part} norm", shape, tokens, linear.num_outputs, w, num_rows=num_rows, keeps=keeps)
    if keeps and w >= 4:
        tape.rename(f"{linear.name} out", f"{part} norm in")
    else:
        tape.drop(f"{linear.name} out")
    tape.rename(f"{part} norm out", f"{linear.name} out")


def _norm_result(tape: Tape, name: str, shape: ModelShape, size: PassSize, *, keeps: bool) -> str:
    """Norm what comes out of attention or MLP, and return the name of the result."""
    source = f"{(shape.output_linear if name == 'norm 1' else shape.mlp_linears[-1]).name} out"
    _norm(tape, name, shape, size.num_tokens, shape.hidden_size, size.value_bytes, keeps=keeps)
    if keeps and size.value_bytes >= 4:
        tape.rename(source, f"{name} in")
    else:
        tape.drop(source)
    return f"{name} out"


def _linear(tape: Tape, linear: Linear, size: PassSize, *, keeps: bool) -> None:
    w, tokens, rank, name = size.value_bytes, size.num_tokens, size.rank, linear.name
    outputs = w * tokens * linear.num_outputs
    _dequantize(tape, linear, w, copies_of_scales=2)
    tape.make("product", outputs)
    tape.drop("scales", "weight")
    tape.make("copy", outputs)
    tape.drop("product")
    if size.casts_lora:
        tape.make(f"{name} A", w * rank * linear.num_inputs)
    tape.make(f"{name} low", w * tokens * rank)
    if size.casts_lora:
        tape.make(f"{name} B", w * rank * linear.num_outputs)
    tape.make("update", outputs)
    if not keeps:
        tape.drop(f"{name} low")
        tape.drop_if_there(f"{name} A", f"{name} B")
    tape.make("scaled", outputs)
    tape.drop("update")
    tape.make(f"{name} out", outputs)
    tape.drop("scaled", "copy")


def _dequantize(tape: Tape, linear: Linear, w: int, copies_of_scales: int) -> None:
    tape.make("scales", copies_of_scales * 4 * linear.num_weights // NF4_BLOCK)
    tape.make("weight", w * linear.num_weights)


def _attend(tape: Tape, shape: ModelShape, size: PassSize, *, keeps: bool) -> None:
    w, tokens = size.value_bytes, size.num_tokens
    queries, keys = w * tokens * shape.num_query_values, w * tokens * shape.num_kv_values
    is_split = len(shape.attention_linears) == 3
    for part, num_bytes in (("q", queries), ("k", keys)):
        tape.make("turned", num_bytes)
        tape.make("half", num_bytes // 2)
        tape.make("half turned", num_bytes)
        tape.drop("half")
        tape.make("by sine", num_bytes)
        tape.drop("half turned")
        tape.make(f"{part} rotated", num_bytes)
        tape.drop("turned", "by sine")
    if is_split:
        tape.drop("q_proj out", "k_proj out")
        tape.rename("v_proj out", "v")
    else:  # v is a view into the fused product, which lives as long as attention needs it
        tape.make("v", 0)
    if _is_repeated(shape, size):
        tape.make("k repeated", queries)
        tape.make("v repeated", queries)
    tape.make("attention out", queries)
    tape.make("log-sum-exp", 4 * tokens * shape.num_heads)
    if not keeps:
        tape.drop("log-sum-exp")
        tape.drop_if_there("k repeated", "v repeated")
    if not size.is_flash:  # sample by sample, then joined, then in the order of tokens
        tape.make("turned", queries)
        if not keeps:
            tape.drop("attention out")
        tape.make("joined", queries)
        tape.drop("turned")


def _run_mlp(tape: Tape, shape: ModelShape, size: PassSize, *, keeps: bool) -> None:
    w, tokens = size.value_bytes, size.num_tokens
    inner = w * tokens * shape.intermediate_size
    first, *middle, last = shape.mlp_linears
    is_gated = bool(middle) or first.num_outputs > shape.intermediate_size
    _linear(tape, first, size, keeps=keeps)
    tape.make("activated", inner)
    if not keeps and middle:
        tape.drop(f"{first.name} out")
    for linear in middle:
        _linear(tape, linear, size, keeps=keeps)
    if is_gated:
        tape.make("gated", inner)
        if not keeps:
            tape.drop("activated")
            tape.drop_if_there(*(f"{linear.name} out" for linear in (first, *middle)))
    _linear(tape, last, size, keeps=keeps)
    if not keeps:
        tape.drop("gated" if is_gated else "activated")
        tape.drop_if_there(f"{first.name} out")


# Backward, in reverse


def _reverse_block(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    state, is_after = size.value_bytes * size.num_tokens * shape.hidden_size, _has_norms_after(shape)
    tape.make("gradient", state)
    inner = "gradient"
    if is_after:
        inner = "norm gradient"
        _reverse_norm(tape, "norm 2", shape, size, shape.hidden_size, gradient="gradient", result=inner)
    _reverse_mlp(tape, shape, size, gradient=inner, source="middle" if is_after else "norm 2 out")
    if not is_after:
        _reverse_norm(tape, "norm 2", shape, size, shape.hidden_size, gradient="mlp gradient", result="mlp gradient")
        tape.drop_if_there("middle")
    _add(tape, "gradient", "mlp gradient", state)
    if is_after:
        _reverse_norm(tape, "norm 1", shape, size, shape.hidden_size, gradient="gradient", result=inner)
    _reverse_linear(
        tape,
        shape.output_linear,
        size,
        gradient=inner,
        result="attention gradient",
        source=None if size.is_flash else "joined",
        ends_gradient=is_after,
    )
    _reverse_attention(tape, shape, size)
    result: str | None = None
    for linear in reversed(shape.attention_linears):
        source = None
        if linear is shape.attention_linears[0] and not is_after:
            source = "norm 1 out"
        back = f"{linear.name} back" if result else "attention back"
        _reverse_linear(tape, linear, size, gradient=f"{linear.name} gradient", result=back, source=source)
        if result:
            _add(tape, result, back, state)
        result = "attention back"
    if not is_after:
        _reverse_norm(
            tape, "norm 1", shape, size, shape.hidden_size, gradient="attention back", result="attention back"
        )
    tape.drop_if_there("input")
    _add(tape, "gradient", "attention back", state)
    tape.drop("gradient")


def _reverse_mlp(tape: Tape, shape: ModelShape, size: PassSize, *, gradient: str, source: str) -> None:
    w, tokens = size.value_bytes, size.num_tokens
    inner = w * tokens * shape.intermediate_size
    first, *middle, last = shape.mlp_linears
    is_gated = bool(middle) or first.num_outputs > shape.intermediate_size
    _reverse_linear(
        tape,
        last,
        size,
        gradient=gradient,
        result="inner gradient",
        source="gated" if is_gated else "activated",
        ends_gradient=gradient != "gradient",
    )
    if is_gated:
        tape.make("up gradient", inner)
        tape.make("activated gradient", inner)
        tape.drop("inner gradient", "activated")
        if middle:
            tape.drop(f"{middle[0].name} out")
    if middle:
        _reverse_linear(tape, middle[0], size, gradient="up gradient", result="mlp gradient")
        tape.make("first gradient", inner)
        tape.drop("activated gradient", f"{first.name} out")
        _reverse_linear(tape, first, size, gradient="first gradient", result="more", source=source)
        _add(tape, "mlp gradient", "more", w * tokens * shape.hidden_size)
    else:
        tape.make("first gradient", w * tokens * first.num_outputs)
        tape.drop_if_there("activated gradient", "up gradient", "inner gradient")
        tape.drop(f"{first.name} out")
        _reverse_linear(tape, first, size, gradient="first gradient", result="mlp gradient", source=source)


def _add(tape: Tape, total: str, part: str, num_bytes: int) -> None:
    tape.make("sum", num_bytes)
    tape.drop(total, part, "sum")
    tape.make(total, num_bytes)


def _reverse_linear(
    tape: Tape,
    linear: Linear,
    size: PassSize,
    *,
    gradient: str,
    result: str,
    source: str | None = None,
    ends_gradient: bool = True,
) -> None:
    # `source` is the layer's input where nothing later needs it.
    w, tokens, rank, name = size.value_bytes, size.num_tokens, size.rank, linear.name
    inputs, outputs = w * tokens * linear.num_inputs, w * tokens * linear.num_outputs
    tape.make("scaled", outputs)
    tape.make("B gradient", w * rank * linear.num_outputs)
    tape.make("low gradient", w * tokens * rank)
    tape.drop("scaled", f"{name} low")
    tape.drop_if_there(f"{name} B")
    if size.casts_lora:
        tape.make("float32 gradient", 4 * rank * linear.num_outputs)
        tape.drop("float32 gradient")
    tape.drop("B gradient")
    tape.make("A gradient", w * rank * linear.num_inputs)
    tape.make("low back", inputs)
    tape.drop("low gradient")
    tape.drop_if_there(f"{name} A")
    if source is not None:
        tape.drop(source)
    if size.casts_lora:
        tape.make("float32 gradient", 4 * rank * linear.num_inputs)
        tape.drop("float32 gradient")
    tape.drop("A gradient")
    _dequantize(tape, linear, w, copies_of_scales=1)
    tape.make("base back", inputs)
    tape.drop("scales", "weight")
    if ends_gradient:
        tape.drop(gradient)
    tape.make(result, inputs)
    tape.drop("low back", "base back")


def _reverse_attention(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    w, tokens = size.value_bytes, size.num_tokens
    queries, keys = w * tokens * shape.num_query_values, w * tokens * shape.num_kv_values
    is_repeated = _is_repeated(shape, size)
    tape.make("q gradient", queries)
    tape.make("k gradient", queries if is_repeated else keys)
    tape.make("v gradient", queries if is_repeated else keys)
    if size.is_flash:
        # The kernel sums dQ in float32, for tokens rounded up to 128 a sample.
        tape.make("float32 q gradient", 4 * (tokens + 128) * shape.num_query_values)
        tape.drop("float32 q gradient")
    else:
        # Each sample's gradient is spread over all tokens and added to the sum of those before.
        tape.make("spread", queries)
        tape.make("sum", queries)
        tape.drop("spread", "sum")
    tape.drop("attention gradient", "attention out", "log-sum-exp", "q rotated")
    tape.drop(*(("k repeated", "v repeated") if is_repeated else ("k rotated", "v")))
    if is_repeated:
        for part in ("k", "v"):
            tape.make("summed", keys)
            tape.drop(f"{part} gradient", "summed")
            tape.make(f"{part} gradient", keys)
    for part, num_bytes in (("k", keys), ("q", queries)):
        tape.make("turned", num_bytes)
        tape.make("half", num_bytes // 2)
        tape.make("turned back", num_bytes)
        tape.drop("half")
        tape.make("sum", num_bytes)
        tape.drop("turned", "turned back", "sum", f"{part} gradient")
        tape.make(f"{part} gradient", num_bytes)
    if shape.normalized_head_values:
        for part, width in (("k", shape.num_kv_values), ("q", shape.num_query_values)):
            gradient = f"{part} gradient"
            _reverse_norm(tape, f"{part} norm", shape, size, width, gradient=gradient, result=gradient)
    if len(shape.attention_linears) == 3:
        for part in ("q", "k", "v"):
            tape.make(f"{part}_proj gradient", queries if part == "q" else keys)
            tape.drop(f"{part} gradient")
    else:
        tape.make("qkv_proj gradient", queries + 2 * keys)
        tape.drop("q gradient", "k gradient", "v gradient")
        tape.drop_if_there("qkv_proj out")


def _reverse_norm(
    tape: Tape, name: str, shape: ModelShape, size: PassSize, width: int, *, gradient: str, result: str
) -> None:
    # A gradient of another name than the result is needed again: by what the norm's result was added to.
    w, values = size.value_bytes, size.num_tokens * width
    ended = [gradient] if gradient == result else []
    if shape.family == "starcoder2":  # one kernel
        tape.make("to input", w * values)
        tape.drop(f"{name} rsqrt", *ended)
        tape.drop_if_there(f"{name} in")
        tape.rename("to input", result)
        return
    if w >= 4:
        tape.make("upstream", 4 * values)
        tape.drop_if_there(*ended)
    else:
        # By the weight in 16 bits and then to float32; OLMo 2 the other way round.
        tape.make("first", (4 if _has_norms_after(shape) else w) * values)
        tape.drop_if_there(*ended)
        tape.make("upstream", 4 * values)
        tape.drop("first")
    _reverse_scaling(tape, name, 4 * values)
    if w >= 4:
        tape.rename("to input", result)
    else:
        tape.make(result, w * values)
        tape.drop("to input")


def _reverse_scaling(tape: Tape, name: str, num_bytes: int) -> None:
    """Reverse x / sqrt(mean(x²)), in float32."""
    tape.make("to rsqrt", num_bytes)
    tape.make("to input", num_bytes)
    tape.drop("to rsqrt", "upstream", f"{name} rsqrt")
    for part in ("spread", "mean", "square", "square back"):
        tape.make(part, num_bytes)
    tape.drop("square", "mean", "spread", "square back")
    tape.drop_if_there(f"{name} in")
