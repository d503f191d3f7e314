"""The pass that reads a prompt in the decoder for CUDA, tensor by tensor, as `dsft/infer/decoding/cuda` runs it.

T stands for tokens read at once. Python frees a tensor when its name is given to the next one, so a block still holds
what the one before left in `states`, `attended`, `gated` and `delta`.
"""

from dataclasses import dataclass

from dsft.core.memory.model_shape import Linear, ModelShape
from dsft.core.memory.tape import Tape

MAX_PASS_TOKENS = 4096
"""Of a prompt that is read at once; longer ones are read in several passes."""

MAX_FEW_TOKENS = 64
"""Up to here NF4 weights are not written out."""

_VALUE_BYTES = 2
_LEAST_RANK = 16


@dataclass(frozen=True)
class PromptPass:
    """A pass over a stretch of a prompt.

    Attributes:
        num_tokens: Tokens read, more than MAX_FEW_TOKENS.
        num_keys: Tokens attended to: these, and those that were read before.
        rank: Padded LoRA rank; 0 without an adapter.
        is_4bit: Whether linear layers are in NF4 and are written out in 16 bits.
    """

    num_tokens: int
    num_keys: int
    rank: int
    is_4bit: bool


def prompt_bytes(shape: ModelShape, rank: int, num_tokens: int, *, is_4bit: bool) -> int:
    """Return the most that reading a prompt takes beside weights and cache.

    Args:
        shape: The model.
        rank: LoRA rank, 0 without an adapter.
        num_tokens: Of the prompt; one of few tokens counts as what the decoder reads on trial when it is made.
        is_4bit: Whether the linear layers are in NF4.
    """
    num_full, num_left = divmod(num_tokens, MAX_PASS_TOKENS)
    stretches = [(max(num_left, MAX_FEW_TOKENS + 1), num_tokens)]
    if num_full:
        stretches.append((MAX_PASS_TOKENS, num_full * MAX_PASS_TOKENS))
    padded = pad_rank(rank) if rank else 0
    return max(pass_bytes(shape, PromptPass(tokens, keys, padded, is_4bit)) for tokens, keys in stretches)


def pass_bytes(shape: ModelShape, size: PromptPass) -> int:
    """Return the most that one pass takes beside weights and cache.

    Of a model with 4 bits the largest moment is mostly the product of gate and up, while their weights are written
    out: 2·T·(3·hidden + queries + 3·inner) + 4·inner·hidden bytes. With 16 bits it is the gating after it:
    2·T·(3·hidden + queries + 4·inner).
    """
    tape = Tape()
    tokens, state = size.num_tokens, _VALUE_BYTES * size.num_tokens * shape.hidden_size
    tape.make("ids", 8 * tokens)
    tape.make("positions", 4 * tokens)
    tape.make("slots", 4 * tokens)
    tape.make("residual", state)
    # From the second block on all are alike.
    for _ in range(min(2, shape.num_blocks)):
        _run_block(tape, shape, size)
    _replace(tape, "states", state)
    _replace(tape, "states", _VALUE_BYTES * shape.hidden_size)  # the last token's alone
    tape.make("logits", _VALUE_BYTES * shape.vocab_size)
    tape.make("float32 logits", 4 * shape.vocab_size)
    return tape.peak_bytes


def fuse_linears(shape: ModelShape) -> tuple[tuple[Linear, ...], ...]:
    """Return a block's linear layers in the groups that are laid side by side, as they read the same input."""
    return (shape.attention_linears, (shape.output_linear,), shape.mlp_linears[:-1], shape.mlp_linears[-1:])


def pad_rank(rank: int) -> int:
    """Return the rank that factors are padded to: a power of two, at least 16."""
    return max(_LEAST_RANK, 1 << (rank - 1).bit_length())


def _run_block(tape: Tape, shape: ModelShape, size: PromptPass) -> None:
    attention_input, attention_output, mlp_input, mlp_output = fuse_linears(shape)
    state = _VALUE_BYTES * size.num_tokens * shape.hidden_size
    _replace(tape, "states", state)
    _attend(tape, shape, size, attention_input)
    _multiply(tape, size, attention_output, "delta")
    _replace(tape, "states", state)
    _multiply(tape, size, mlp_input, "gate and up")
    _replace(tape, "gated", _VALUE_BYTES * size.num_tokens * shape.intermediate_size)
    tape.drop("gate and up")
    _multiply(tape, size, mlp_output, "delta")


def _attend(tape: Tape, shape: ModelShape, size: PromptPass, attention_input: tuple[Linear, ...]) -> None:
    queries = _VALUE_BYTES * size.num_tokens * shape.num_query_values
    _multiply(tape, size, attention_input, "queries, keys, values")
    tape.make("rotated queries", queries)
    if shape.num_heads > shape.num_kv_heads:  # read from the cache, and repeated for each query head
        tape.make("repeated keys", _VALUE_BYTES * size.num_keys * shape.num_query_values)
        tape.make("repeated values", _VALUE_BYTES * size.num_keys * shape.num_query_values)
    tape.make("log-sum-exp", 4 * size.num_tokens * shape.num_heads)
    _replace(tape, "attended", queries)
    tape.drop("log-sum-exp", "rotated queries", "queries, keys, values")
    tape.drop_if_there("repeated keys", "repeated values")


def _multiply(tape: Tape, size: PromptPass, linears: tuple[Linear, ...], result: str) -> None:
    if size.is_4bit:
        tape.make("weights written out", _VALUE_BYTES * sum(linear.num_weights for linear in linears))
    # The name may still hold the result of an earlier layer.
    tape.make(f"new {result}", _VALUE_BYTES * size.num_tokens * sum(linear.num_outputs for linear in linears))
    tape.drop_if_there("weights written out")
    if size.rank:
        tape.make("lowered", _VALUE_BYTES * size.num_tokens * size.rank * len(linears))
        tape.drop("lowered")
    tape.drop_if_there(result)
    tape.rename(f"new {result}", result)


def _replace(tape: Tape, name: str, num_bytes: int) -> None:
    """Make a tensor, then drop the one that had its name."""
    tape.make(f"new {name}", num_bytes)
    tape.drop_if_there(name)
    tape.rename(f"new {name}", name)
