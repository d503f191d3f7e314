"""The forward pass of a block in dsft's engine, tensor by tensor, in the order of `dsft/core/engine/halves.py`."""

from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.pass_size import PassSize
from dsft.core.memory.tape import Tape


def run_block(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    """Write a block's forward pass on a tape.

    It makes the same whether it recomputes or not: what a block doesn't keep goes when its forward pass ends. Its input
    is there from the beginning and not on the tape; at the end the tape holds its output and all that it keeps.
    """
    _run_attention_half(tape, shape, size)
    _run_mlp_half(tape, shape, size)


def repeats_keys(shape: ModelShape, size: PassSize) -> bool:
    """Return whether keys and values are repeated, which a flash kernel does not need."""
    return shape.num_heads > shape.num_kv_heads and not size.is_flash


def _run_attention_half(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    w, tokens, rank = size.value_bytes, size.num_tokens, size.rank
    queries, keys = shape.num_query_values, shape.num_kv_values
    tape.make("qkv in", w * tokens * (shape.hidden_size + 3 * rank))  # with the products with A beside it
    tape.make("norm 1 rsqrt", 4 * tokens)
    tape.make("qkv low", w * tokens * 3 * rank)
    tape.make("qkv", w * tokens * (queries + 2 * keys))
    tape.drop("qkv in")
    if shape.normalized_head_values:
        tape.make("q and k normed", w * tokens * (queries + keys))
        tape.make("q rsqrt", 4 * tokens * shape.num_heads)
        tape.make("k rsqrt", 4 * tokens * shape.num_kv_heads)
    _attend(tape, shape, size)
    tape.make("o low", w * tokens * rank)
    tape.make("middle", w * tokens * shape.hidden_size)
    tape.drop_if_there("in order of tokens")


def _attend(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    w, tokens = size.value_bytes, size.num_tokens
    queries = w * tokens * shape.num_query_values
    if repeats_keys(shape, size):
        tape.make("k repeated", queries)
        tape.make("v repeated", queries)
    tape.make("attention out", queries)
    tape.make("log-sum-exp", 4 * tokens * shape.num_heads)
    if not size.is_flash:  # sample by sample, then joined, then in the order of tokens
        tape.make("joined", queries)
        tape.make("in order of tokens", queries)


def _run_mlp_half(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    w, tokens, rank = size.value_bytes, size.num_tokens, size.rank
    tape.make("gate_up in", w * tokens * (shape.hidden_size + 2 * rank))
    tape.make("norm 2 rsqrt", 4 * tokens)
    tape.make("gate_up low", w * tokens * 2 * rank)
    tape.make("gate_up", w * tokens * 2 * shape.intermediate_size)
    tape.drop("gate_up in")
    tape.make("gated", w * tokens * (shape.intermediate_size + rank))
    tape.make("down low", w * tokens * rank)
    tape.make("output", w * tokens * shape.hidden_size)
    tape.drop("gated")
