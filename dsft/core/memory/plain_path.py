"""The life of every tensor in a step through transformers' blocks with PEFT's LoRA on bitsandbytes' NF4 layers.

Written down from the code of transformers 5.23, peft 0.21 and bitsandbytes 0.50, and checked against PyTorch's record
of allocations on a GPU (docs/benchmarks/memory.md). T stands for tokens of a micro-batch, h for the hidden size, r for
the rank; sizes are in bytes of the compute type, w (2, or 4 for float32). With a 16-bit type autocast is on, without
its cache: LoRA's float32 weights are cast at each use, and a cast lives as long as something that needs it.
"""

from functools import cache

from dsft.core.memory.loss_chunks import chunk_rows
from dsft.core.memory.model_shape import ModelShape, in_blocks
from dsft.core.memory.pass_size import PassSize
from dsft.core.memory.plain_backward import reverse_block, reverse_norm
from dsft.core.memory.plain_forward import has_norms_after, run_block, run_norm
from dsft.core.memory.tape import Segment, Tape


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
    run_block(tape, shape, size)
    return Segment(tape.peak_bytes, tape.live_bytes)


@cache
def recomputed_forward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the forward pass of a block that recomputes, or of one in a validation pass.

    It keeps only its input (w·T·h), and that for the backward pass alone.
    """
    tape = Tape()
    run_block(tape, shape, size, keeps=False)
    kept = in_blocks(size.value_bytes * size.num_tokens * shape.hidden_size)
    return Segment(tape.peak_bytes, kept)


@cache
def block_backward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the backward pass of a block whose activations are there; it frees them as it goes."""
    tape = Tape()
    run_block(tape, shape, size)
    start = tape.live_bytes
    tape.peak_bytes = start
    reverse_block(tape, shape, size)
    return Segment(tape.peak_bytes - start, -start)


@cache
def recomputed_backward(shape: ModelShape, size: PassSize) -> Segment:
    """Return the backward pass of a block that runs forward once more first."""
    w, values = size.value_bytes, size.num_tokens * shape.hidden_size
    tape = Tape()
    tape.make("incoming gradient", w * values)
    start = tape.live_bytes
    # The backward pass stops where it first needs what was not kept: LoRA's B, or the weight of OLMo 2's last norm.
    if not has_norms_after(shape):
        tape.make("gradient so far", w * values)
    elif w < 4:
        tape.make("gradient so far", 4 * values)
    run_block(tape, shape, size)
    tape.drop("incoming gradient")
    tape.drop_if_there("gradient so far")  # both are made once more
    tape.drop_if_there("input")  # what checkpointing kept is the same tensor
    reverse_block(tape, shape, size)
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
    run_norm(tape, "final", shape, tokens, hidden, w)
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
    reverse_norm(tape, "final", shape, size, hidden, gradient="gradient", result="gradient")
    return Segment(tape.peak_bytes, tape.live_bytes)
