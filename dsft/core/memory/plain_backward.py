"""The backward pass of a block on the plain path, tensor by tensor: the forward pass in reverse."""

from dsft.core.memory.model_shape import Linear, ModelShape
from dsft.core.memory.pass_size import PassSize
from dsft.core.memory.plain_forward import dequantize, has_norms_after, repeats_keys
from dsft.core.memory.tape import Tape


def reverse_block(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    """Write a block's backward pass on the tape that holds its forward pass."""
    state, is_after = size.value_bytes * size.num_tokens * shape.hidden_size, has_norms_after(shape)
    tape.make("gradient", state)
    inner = "gradient"
    if is_after:
        inner = "norm gradient"
        reverse_norm(tape, "norm 2", shape, size, shape.hidden_size, gradient="gradient", result=inner)
    _reverse_mlp(tape, shape, size, gradient=inner, source="middle" if is_after else "norm 2 out")
    if not is_after:
        reverse_norm(tape, "norm 2", shape, size, shape.hidden_size, gradient="mlp gradient", result="mlp gradient")
        tape.drop_if_there("middle")
    _add(tape, "gradient", "mlp gradient", state)
    if is_after:
        reverse_norm(tape, "norm 1", shape, size, shape.hidden_size, gradient="gradient", result=inner)
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
        reverse_norm(tape, "norm 1", shape, size, shape.hidden_size, gradient="attention back", result="attention back")
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
    tape.drop_if_there(f"{name} A", f"{name} dropped")
    if source is not None:
        tape.drop_if_there(source)
    if size.casts_lora:
        tape.make("float32 gradient", 4 * rank * linear.num_inputs)
        tape.drop("float32 gradient")
    tape.drop("A gradient")
    if size.has_dropout:
        tape.make("dropout back", inputs)
        tape.drop("low back", f"{name} mask")
        tape.rename("dropout back", "low back")
    dequantize(tape, linear, w, copies_of_scales=1)
    tape.make("base back", inputs)
    tape.drop("scales", "weight")
    if ends_gradient:
        tape.drop(gradient)
    tape.make(result, inputs)
    tape.drop("low back", "base back")


def _reverse_attention(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    w, tokens = size.value_bytes, size.num_tokens
    queries, keys = w * tokens * shape.num_query_values, w * tokens * shape.num_kv_values
    is_repeated = repeats_keys(shape)
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
            reverse_norm(tape, f"{part} norm", shape, size, width, gradient=gradient, result=gradient)
    if len(shape.attention_linears) == 3:
        for part in ("q", "k", "v"):
            tape.make(f"{part}_proj gradient", queries if part == "q" else keys)
            tape.drop(f"{part} gradient")
    else:
        tape.make("qkv_proj gradient", queries + 2 * keys)
        tape.drop("q gradient", "k gradient", "v gradient")
        tape.drop_if_there("qkv_proj out")


def reverse_norm(
    tape: Tape, name: str, shape: ModelShape, size: PassSize, width: int, *, gradient: str, result: str
) -> None:
    """Write a norm's backward pass on a tape.

    A gradient of another name than the result is needed again: by what the norm's result was added to.
    """
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
        tape.make("first", (4 if has_norms_after(shape) else w) * values)
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
