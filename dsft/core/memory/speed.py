"""How long an optimizer step takes, roughly: to choose between plans, and to say by how much one is faster.

A pass is bound either by the GPU (matrix products, and memory traffic of everything else) or by the host that launches
its kernels. The constants were fitted to the step times of DeepSeek-Coder-6.7B's shape on an H100 that
docs/benchmarks/memory.md lists; on other cards the result is a prediction and is called one.
"""

from dataclasses import dataclass

from dsft.core.memory.cards import Card
from dsft.core.memory.model_shape import ModelShape

_LAUNCH_S_KEPT = 0.0085
"""Host time of a block's forward and backward pass, which launch about 250 kernels through Python."""

_LAUNCH_S_RECOMPUTED = 0.0075
"""Host time a block takes in addition if it runs forward twice, checkpointing included."""

_BANDWIDTH_SHARE = 0.85
"""Of the data sheet's memory bandwidth, in elementwise kernels."""

_OPTIMIZER_STEP_S = 0.03
"""An optimizer step over a few hundred tensors, launches included."""

_HOST_LINK_BYTES_PER_S = 20e9
"""PCIe 4.0 x16 as paged memory uses it."""


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
    """
    share = num_recomputed / shape.num_blocks
    lora, head = shape.num_lora_weights(rank), shape.vocab_size * shape.hidden_size
    flops = step_tokens * (2 * shape.num_linear_weights * (2 + share) + 2 * lora * (3 + share) + 4 * head)
    width = 2
    outputs = sum(linear.num_outputs for linear in shape.block_linears)
    # Read and written by a block's forward pass for a token: nine times each linear output, the norms in float32, the
    # rotation, the activation. The backward pass moves 1.2 times as much.
    moved = width * (9 * outputs + 64 * shape.hidden_size + 20 * shape.num_query_values + 10 * shape.intermediate_size)
    traffic = step_tokens * shape.num_blocks * moved * (1 + 1.2 + share)
    # The weights themselves: read in 4 bits, written in 16 and read again, for each pass over them.
    traffic += num_passes * (2 + share) * shape.num_linear_weights * 4.5
    gpu_s = flops / (card.matmul_flops * matmul_share(card)) + traffic / (card.bandwidth * _BANDWIDTH_SHARE)
    host_s = num_passes * (shape.num_blocks * _LAUNCH_S_KEPT + num_recomputed * _LAUNCH_S_RECOMPUTED)
    paging_s = 2 * paged_bytes / _HOST_LINK_BYTES_PER_S
    return StepTime(max(gpu_s, host_s) + _OPTIMIZER_STEP_S + paging_s, host_s > gpu_s)
