"""The life of every tensor in a step through the blocks of dsft's engine (`dsft/core/engine/`), and what is constant.

Written down from that code; tests hold it against real passes on a CPU. T stands for tokens of a micro-batch, h for the
hidden size, r for the rank, w for the bytes of a value in the compute type. Nothing is cast: LoRA's weights have a copy
in the compute type, refreshed once a step, and LoRA's gradients are added to where they stay.
"""

from functools import cache

from dsft.core.memory.engine_backward import begin_gradient, reverse_block
from dsft.core.memory.engine_forward import run_block
from dsft.core.memory.loss_chunks import chunk_rows
from dsft.core.memory.model_shape import NF4_BLOCK, SCALE_BLOCK, Linear, ModelShape, in_blocks
from dsft.core.memory.pass_size import PassSize
from dsft.core.memory.tape import Segment, Tape


@cache
def block_forward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the forward pass of a block that keeps its activations.

    Kept are, for a token: the inputs of both halves (2·w·h), queries, keys and values, attention's output, gate and up
    (2·w·intermediate), each linear layer's product with A (w·r), in float32 the roots of the norms and attention's
    log-sum-exp; and queries and keys once more where they pass norms of their own.
    """
    tape = Tape()
    run_block(tape, shape, size)
    _take_input(tape, shape, size)
    return Segment(tape.peak_bytes, tape.live_bytes)


@cache
def recomputed_forward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the forward pass of a block that recomputes, or of one in a validation pass: its input stays (w·T·h)."""
    tape = Tape()
    run_block(tape, shape, size)
    return Segment(tape.peak_bytes, in_blocks(size.value_bytes * size.num_tokens * shape.hidden_size))


@cache
def block_backward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the backward pass of a block whose activations are there, the last one: half by half it frees them.

    What comes in from the norm behind it has no columns to spare, so it is copied; autograd holds it until the pass has
    returned.
    """
    tape = Tape()
    run_block(tape, shape, size)
    _take_input(tape, shape, size)
    start = tape.live_bytes
    tape.peak_bytes = start
    tape.make("incoming gradient", size.value_bytes * size.num_tokens * shape.hidden_size)
    begin_gradient(tape, shape, size)
    reverse_block(tape, shape, size)
    return Segment(tape.peak_bytes - start, -start)


@cache
def recomputed_backward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the backward pass of a block that runs forward once more first.

    The gradient that comes in from the block behind it, columns to spare included, becomes its own; a state of it
    (w·T·h) is not counted here.
    """
    state = in_blocks(size.value_bytes * size.num_tokens * shape.hidden_size)
    tape = Tape()
    begin_gradient(tape, shape, size)
    run_block(tape, shape, size)
    tape.rename("output", "second output")  # until the pass has returned
    reverse_block(tape, shape, size)
    tape.drop("second output")
    return Segment(tape.peak_bytes - state, -state)


def _take_input(tape: Tape, shape: ModelShape, size: PassSize) -> None:
    tape.drop("output")  # the next block's
    tape.make("input", size.value_bytes * size.num_tokens * shape.hidden_size)


@cache
def loss_and_head(shape: ModelShape, size: PassSize) -> Segment:
    """Return the final norm, output head and loss, forward and backward, above what all blocks have left.

    The head keeps the gradient at its input (w·targets·h) and needs a chunk of logits in the compute type, which their
    gradient takes the place of.
    """
    w, tokens, hidden = size.value_bytes, size.num_tokens, shape.hidden_size
    tape = Tape()
    tape.make("final in", w * tokens * hidden)
    tape.make("final out", w * tokens * hidden)
    tape.make("final rsqrt", 4 * tokens)
    states = w * size.num_targets * hidden
    tape.make("states", states)
    tape.make("gradient at states", states)
    rows = min(chunk_rows(shape.vocab_size), max(size.num_targets, 1))
    tape.make("logits", w * rows * shape.vocab_size)
    tape.make("losses", 4 * rows)
    tape.drop("losses", "logits", "final out", "states")
    tape.make("scaled gradient", states)
    tape.drop("gradient at states")
    tape.make("gradient", w * tokens * hidden)
    tape.make("sorted positions", 6 * 8 * size.num_targets)
    tape.drop("sorted positions", "scaled gradient")
    tape.make("gradient at final in", w * tokens * hidden)
    tape.drop("gradient", "final in", "final rsqrt")
    return Segment(tape.peak_bytes, tape.live_bytes)


def dequantization_values(shape: ModelShape, rank: int) -> int:
    """Return the values of the engine's workspace: the largest group of weights with LoRA's A below or B beside it."""
    return max(_group_values(group, rank) for group in _groups(shape))


def table_bytes(shape: ModelShape, value_bytes: int) -> int:
    """Return the bytes of what the engine keeps beside the weights.

    Biases once more, those of a group behind one another, and a float32 for each group of scales: what is added to it.
    """
    total = 0
    for group in _groups(shape):
        if any(linear.has_bias for linear in group):
            total += in_blocks(value_bytes * sum(linear.num_outputs for linear in group))
        counts = [-(-linear.num_weights // NF4_BLOCK) for linear in group]
        num_groups = [-(-count // SCALE_BLOCK) for count in counts]
        # Layers whose groups end with them are laid behind one another.
        is_joined = all(count % SCALE_BLOCK == 0 for count in counts[:-1])
        total += sum(in_blocks(4 * number) for number in ([sum(num_groups)] if is_joined else num_groups))
    return shape.num_blocks * total


def _groups(shape: ModelShape) -> tuple[tuple[Linear, ...], ...]:
    """Return the linear layers that are multiplied as one, since they take the same input."""
    *inner, last = shape.mlp_linears
    return shape.attention_linears, (shape.output_linear,), tuple(inner), (last,)


def _group_values(group: tuple[Linear, ...], rank: int) -> int:
    num_inputs, low_width = group[0].num_inputs, rank * len(group)
    num_outputs = sum(linear.num_outputs for linear in group)
    return max(num_outputs * (num_inputs + low_width), (num_outputs + low_width) * num_inputs)
