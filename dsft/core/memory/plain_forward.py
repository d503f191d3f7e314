"""The forward pass of a block on the plain path, tensor by tensor, in the order of transformers' decoder layer."""

from dsft.core.memory.model_shape import NF4_BLOCK, Linear, ModelShape
from dsft.core.memory.pass_size import PassSize
from dsft.core.memory.tape import Tape


def run_block(tape: Tape, shape: ModelShape, size: PassSize, *, keeps: bool = True) -> None:
    """Write a block's forward pass on a tape; what `keeps` for the backward pass stays alive."""
    w, tokens, is_after = size.value_bytes, size.num_tokens, has_norms_after(shape)
    state = w * tokens * shape.hidden_size
    if not is_after:
        run_norm(tape, "norm 1", shape, tokens, shape.hidden_size, w, keeps=keeps)
    for linear in shape.attention_linears:
        _linear(tape, linear, size, keeps=keeps)
        if shape.normalized_head_values and linear.name != "v_proj":
            _norm_heads(tape, shape, linear, size, keeps=keeps)
    _attend(tape, shape, size, keeps=keeps)
    _linear(tape, shape.output_linear, size, keeps=keeps)
    if not keeps:
        tape.drop("q rotated")
        tape.drop_if_there("norm 1 out", "attention out", "joined", "k rotated", "v", "qkv_proj out")
    else:
        if repeats_keys(shape):
            tape.drop("k rotated", "v")
            tape.drop_if_there("qkv_proj out")
        if size.has_dropout:
            tape.drop_if_there("norm 1 out", "joined")
    added = _norm_result(tape, "norm 1", shape, size, keeps=keeps) if is_after else "o_proj out"
    tape.make("middle", state)
    tape.drop(added)
    if not is_after:
        run_norm(tape, "norm 2", shape, tokens, shape.hidden_size, w, keeps=keeps)
    _run_mlp(tape, shape, size, keeps=keeps)
    if not keeps or size.has_dropout:  # dropout keeps a copy of its own
        tape.drop_if_there("norm 2 out")
    added = _norm_result(tape, "norm 2", shape, size, keeps=keeps) if is_after else f"{shape.mlp_linears[-1].name} out"
    tape.make("output", state)
    tape.drop(added, "output")
    if not (keeps and _keeps_input(shape, size)):
        tape.drop("middle")
    else:
        tape.make("input", state)  # there from the beginning, and from now on for the backward pass


def has_norms_after(shape: ModelShape) -> bool:
    """Return whether norms follow attention and MLP, and don't come before them."""
    return shape.family == "olmo2"


def repeats_keys(shape: ModelShape) -> bool:
    """Return whether keys and values are repeated: attention gets a key head for each query head."""
    return shape.num_heads > shape.num_kv_heads


def _keeps_input(shape: ModelShape, size: PassSize) -> bool:
    if has_norms_after(shape):  # the input goes to the linear layers, whose LoRA keeps it, or a copy with dropout
        return not size.has_dropout
    return size.value_bytes >= 4 or shape.family == "starcoder2"


def run_norm(
    tape: Tape, name: str, shape: ModelShape, tokens: int, width: int, w: int, *, num_rows: int = 1, keeps: bool = True
) -> None:
    """Write a norm on a tape; of a token's `width` values each of `num_rows` parts has a norm of its own."""
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
            tape.make("rounded", (4 if has_norms_after(shape) else w) * values)
        tape.make(f"{name} out", w * values)
        tape.drop_if_there("rounded", "normal")
    if not keeps:
        tape.drop(f"{name} rsqrt")


def _norm_heads(tape: Tape, shape: ModelShape, linear: Linear, size: PassSize, *, keeps: bool) -> None:
    part, tokens, w = linear.name[0], size.num_tokens, size.value_bytes
    num_rows = 1 if has_norms_after(shape) else linear.num_outputs // shape.head_dim
    run_norm(tape, f"{part} norm", shape, tokens, linear.num_outputs, w, num_rows=num_rows, keeps=keeps)
    if keeps and w >= 4:
        tape.rename(f"{linear.name} out", f"{part} norm in")
    else:
        tape.drop(f"{linear.name} out")
    tape.rename(f"{part} norm out", f"{linear.name} out")


def _norm_result(tape: Tape, name: str, shape: ModelShape, size: PassSize, *, keeps: bool) -> str:
    """Norm what comes out of attention or MLP, and return the name of the result."""
    source = f"{(shape.output_linear if name == 'norm 1' else shape.mlp_linears[-1]).name} out"
    run_norm(tape, name, shape, size.num_tokens, shape.hidden_size, size.value_bytes, keeps=keeps)
    if keeps and size.value_bytes >= 4:
        tape.rename(source, f"{name} in")
    else:
        tape.drop(source)
    return f"{name} out"


def _linear(tape: Tape, linear: Linear, size: PassSize, *, keeps: bool) -> None:
    w, tokens, rank, name = size.value_bytes, size.num_tokens, size.rank, linear.name
    outputs = w * tokens * linear.num_outputs
    dequantize(tape, linear, w, copies_of_scales=2)
    tape.make("product", outputs)
    tape.drop("scales", "weight")
    tape.make("copy", outputs)
    tape.drop("product")
    if size.has_dropout:
        tape.make(f"{name} dropped", w * tokens * linear.num_inputs)
        tape.make(f"{name} mask", tokens * linear.num_inputs)
    if size.casts_lora:
        tape.make(f"{name} A", w * rank * linear.num_inputs)
    tape.make(f"{name} low", w * tokens * rank)
    if size.casts_lora:
        tape.make(f"{name} B", w * rank * linear.num_outputs)
    tape.make("update", outputs)
    if not keeps:
        tape.drop(f"{name} low")
        tape.drop_if_there(f"{name} A", f"{name} B", f"{name} dropped", f"{name} mask")
    tape.make("scaled", outputs)
    tape.drop("update")
    tape.make(f"{name} out", outputs)
    tape.drop("scaled", "copy")


def dequantize(tape: Tape, linear: Linear, w: int, copies_of_scales: int) -> None:
    """Write a layer's weight in the compute type and its scales in float32 on a tape."""
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
    if repeats_keys(shape):
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
        tape.drop_if_there("gated" if is_gated else "activated", f"{first.name} out")
    elif size.has_dropout and is_gated:
        tape.drop("gated")
