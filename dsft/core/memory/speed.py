"""How long an optimizer step takes, roughly: to choose between plans, and to say by how much one is faster.

A pass is bound either by the GPU (matrix products, and memory traffic of everything else) or by the host that launches
its kernels. The constants were fitted to the step times of DeepSeek-Coder-6.7B's shape on an H100 that
docs/benchmarks/memory.md lists; on other cards the result is a prediction and is called one.
"""

from dataclasses import dataclass

from dsft.core.memory.cards import Card
from dsft.core.memory.model_shape import ModelShape

_BANDWIDTH_SHARE = 0.85
"""Of the data sheet's memory bandwidth, in elementwise kernels."""

_HOST_LINK_BYTES_PER_S = 20e9
"""PCIe 4.0 x16 as paged memory uses it."""

_VALUE_BYTES = 2


@dataclass(frozen=True)
class _HostTimes:
    """What the host takes to launch kernels.

    Attributes:
        kept_s: For a block's forward and backward pass.
        recomputed_s: In addition if it runs forward twice.
        optimizer_step_s: For an optimizer step; what the GPU computes in it belongs to it.
    """

    kept_s: float
    recomputed_s: float
    optimizer_step_s: float


_HOST = _HostTimes(kept_s=0.0085, recomputed_s=0.0075, optimizer_step_s=0.03)
"""transformers' modules launch about 250 kernels a block; a block that recomputes has checkpointing to do."""

_ENGINE_HOST = _HostTimes(kept_s=0.0025, recomputed_s=0.001, optimizer_step_s=0.006)
"""The engine launches about 60 kernels a block, some 22 of them forward, and steps LoRA as one tensor."""


@dataclass(frozen=True)
class StepTime:
    """Predicted time of an optimizer step.

    Attributes:
        step_s: All of it.
        is_launch_bound: Whether the GPU waits for the host most of the time.
    """

    step_s: float
    is_launch_bound: bool


def matmul_share(card: Card) -> float:
    """Return the share of a card's matrix rate that products of these sizes reach.

    0.6 on an H100 (575 to 607 of 989 TFLOP/s, held down by its power limit), more where the rate is lower against the
    bandwidth.
    """
    return 0.6 if card.matmul_flops > 5e14 else 0.85


def predict_step(
    shape: ModelShape,
    rank: int,
    card: Card,
    *,
    step_tokens: float,
    num_passes: int,
    num_recomputed: int,
    paged_bytes: int = 0,
    uses_engine: bool = False,
) -> StepTime:
    """Predict the time of an optimizer step.

    A token costs 2 floating-point operations for each linear weight forward, 2 backward (frozen weights have no
    gradient of their own) and 2 more where it is recomputed.

    Args:
        shape: The model.
        rank: LoRA rank.
        card: Where it runs.
        step_tokens: Tokens of an optimizer step.
        num_passes: Micro-batches of an optimizer step.
        num_recomputed: Blocks that recompute.
        paged_bytes: Optimizer state that has to come from host memory and go back.
        uses_engine: Whether dsft's engine computes the blocks.
    """
    share = num_recomputed / shape.num_blocks
    lora, head = shape.num_lora_weights(rank), shape.vocab_size * shape.hidden_size
    flops = step_tokens * (2 * shape.num_linear_weights * (2 + share) + 2 * lora * (3 + share) + 4 * head)
    moved = _move_with_engine(shape, share) if uses_engine else _move(shape, share)
    traffic = step_tokens * shape.num_blocks * _VALUE_BYTES * moved
    # The weights themselves: read in 4 bits, written in 16 and read again, for each pass over them.
    traffic += num_passes * (2 + share) * shape.num_linear_weights * 4.5
    gpu_s = flops / (card.matmul_flops * matmul_share(card)) + traffic / (card.bandwidth * _BANDWIDTH_SHARE)
    host = _ENGINE_HOST if uses_engine else _HOST
    host_s = num_passes * (shape.num_blocks * host.kept_s + num_recomputed * host.recomputed_s)
    paging_s = 2 * paged_bytes / _HOST_LINK_BYTES_PER_S
    return StepTime(max(gpu_s, host_s) + host.optimizer_step_s + paging_s, host_s > gpu_s)


def _move(shape: ModelShape, share: float) -> float:
    """Return the values that a block of the plain path reads and writes for a token, but for its matrix products.

    Forward: nine times each linear output, the norms in float32, the rotation, the activation. The backward pass moves
    1.2 times as much.
    """
    outputs = sum(linear.num_outputs for linear in shape.block_linears)
    forward = 9 * outputs + 64 * shape.hidden_size + 20 * shape.num_query_values + 10 * shape.intermediate_size
    return forward * (1 + 1.2 + share)


def _move_with_engine(shape: ModelShape, share: float) -> float:
    """Return the same for a block of the engine, counted in `dsft/core/engine/halves.py`.

    The products of rank r belong to it: they are bound by the tensors they read.
    """
    hidden, queries, keys, inner = (
        shape.hidden_size,
        shape.num_query_values,
        shape.num_kv_values,
        shape.intermediate_size,
    )
    # Two norms 4, their products with A 2, what o adds with B 2; rotation 2 and attention 2 of queries and of keys with
    # values, o's product with A 1; gating 3 and down's product with A 1.
    forward = 8 * hidden + 5 * queries + 4 * keys + 4 * inner
    # The incoming gradient 2; of o and down 2 each, of both norms 5 each, products with norm(x) 2. Attention with its
    # sums in float32 10 and 4, rotation 2 and 4, products with B 2 and 4, o's with its input 1. The gating 6, products
    # with B 4, down's with its input 1.
    backward = 18 * hidden + 15 * queries + 12 * keys + 11 * inner
    if shape.normalized_head_values:
        forward += 2 * (queries + keys)
        backward += 3 * (queries + keys)
    return forward * (1 + share) + backward
