"""The backward pass of a block in dsft's engine, tensor by tensor; LoRA's gradients go into memory that is there."""

from dsft.core.memory.engine_forward import repeats_keys
from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.pass_size import PassSize
from dsft.core.memory.tape import Tape


def begin_gradient(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    """Write on a tape the gradient of the residual stream, with columns to spare for a product with B."""
    tape.make("gradient", size.value_bytes * size.num_tokens * (shape.hidden_size + size.rank))


def reverse_block(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    """Write a block's backward pass on the tape that holds what it kept and the residual stream's gradient."""
    _reverse_mlp_half(tape, shape, size)
    _reverse_attention_half(tape, shape, size)
    tape.drop("gradient")
    tape.drop_if_there("incoming gradient")  # of the last block: the others' is the same buffer
    tape.drop_if_there("input")  # counted with what was kept before where the block recomputes


def _reverse_mlp_half(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    w, tokens, rank = size.value_bytes, size.num_tokens, size.rank
    tape.make("gated gradient", w * tokens * shape.intermediate_size)
    tape.make("gate_up gradient", w * tokens * 2 * (shape.intermediate_size + rank))
    tape.drop("gated gradient")
    tape.make("normed", w * tokens * shape.hidden_size)  # the gradient at it first
    tape.drop("normed", "gate_up gradient")
    # The whole half goes when its backward pass has returned.
    tape.drop("middle", "norm 2 rsqrt", "gate_up low", "gate_up", "down low")


def _reverse_attention_half(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    w, tokens, rank = size.value_bytes, size.num_tokens, size.rank
    queries, keys = w * tokens * shape.num_query_values, w * tokens * shape.num_kv_values
    if not size.is_flash:
        tape.make("in order of tokens", queries)
    tape.make("attention gradient", queries)
    _reverse_attention(tape, shape, size)
    tape.make("qkv gradient", queries + 2 * keys + w * tokens * 3 * rank)
    tape.drop("q gradient", "k gradient", "v gradient", "attention gradient")
    tape.drop_if_there("in order of tokens")
    tape.make("normed", w * tokens * shape.hidden_size)
    tape.drop("normed", "qkv gradient")
    tape.drop("norm 1 rsqrt", "qkv low", "qkv", "o low")
    tape.drop("attention out" if size.is_flash else "joined")
    tape.drop_if_there("q and k normed", "q rsqrt", "k rsqrt")


def _reverse_attention(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    w, tokens = size.value_bytes, size.num_tokens
    queries, keys = w * tokens * shape.num_query_values, w * tokens * shape.num_kv_values
    is_repeated = repeats_keys(shape, size)
    tape.make("q gradient", queries)
    tape.make("k gradient", queries if is_repeated else keys)
    tape.make("v gradient", queries if is_repeated else keys)
    if size.is_flash:
        # The kernel sums dQ in float32, for tokens rounded up to 128 a sample, and dK and dV for each query head.
        tape.make("float32 q gradient", 4 * (tokens + 128) * shape.num_query_values)
        if shape.num_heads > shape.num_kv_heads:
            tape.make("k gradient of query heads", queries)
            tape.make("v gradient of query heads", queries)
        tape.drop("float32 q gradient")
        tape.drop_if_there("k gradient of query heads", "v gradient of query heads")
    else:
        # Each sample's gradient is spread over all tokens and added to the sum of those before.
        tape.make("spread", queries)
        tape.make("sum", queries)
        tape.drop("spread", "sum", "attention out")
    tape.drop("log-sum-exp")
    if is_repeated:
        tape.drop("k repeated", "v repeated")
        for part in ("k", "v"):
            tape.make("summed", keys)
            tape.drop(f"{part} gradient", "summed")
            tape.make(f"{part} gradient", keys)
