"""The memory of a training run, term by term: what PyTorch allocates, what it reserves, and what the device shows."""

from dataclasses import dataclass
from enum import StrEnum

from dsft.core.memory.block_path import ENGINE_PATH, PLAIN_PATH
from dsft.core.memory.cards import Card, workspace_bytes
from dsft.core.memory.engine_path import dequantization_values, table_bytes
from dsft.core.memory.model_shape import (
    ModelShape,
    in_blocks,
    quantized_bytes,
    unquantized_bytes,
)
from dsft.core.memory.pass_size import PassSize

MIB = 1024**2

PAGED_FROM_VALUES = 100_000
"""bitsandbytes pages the optimizer state of a tensor from this many values on; a smaller one's stays on the device."""

LOADING_HOLES_BYTES = 32 * MIB
LOADING_HOLES_SHARE = 0.02
"""Left between the weights when they are quantized one after the other: so much, and a share of them. Fitted."""

RECOMPUTE_FRAGMENTATION = 0.195
"""Share of a block's working set that lies idle between tensors of other sizes while it recomputes. Fitted, as the
others, on the rows marked so in docs/benchmarks/memory.md; the sizes in a block keep their proportions, so the share
does not depend on the number of tokens."""

FORWARD_FRAGMENTATION = 0.15
"""The same share in the forward pass and the loss."""

ENGINE_FORWARD_FRAGMENTATION = 0.26
"""The same share where dsft's engine computes the blocks. The engine's are fitted on the rows marked so in
docs/benchmarks/memory-engine.md."""

ENGINE_RECOMPUTE_HOLES_SHARE = 0.05
"""What lies idle while an engine's block recomputes, as a share of the quantized weights: measured, it does not grow
with the tokens."""


class Group(StrEnum):
    """Where a term belongs: for drawing."""

    WEIGHTS = "weights"
    LORA = "LoRA"
    ACTIVATIONS = "activations"
    OVERHEAD = "overhead"


@dataclass(frozen=True)
class Term:
    """One line of an estimate.

    Attributes:
        name: What takes the memory.
        num_bytes: How much, at the peak.
        formula: How that is calculated, with the numbers put in.
        group: Where it belongs.
    """

    name: str
    num_bytes: int
    formula: str
    group: Group


@dataclass(frozen=True)
class TrainingLoad:
    """What a training step has to hold.

    Attributes:
        shape: The model.
        rank: LoRA rank.
        num_tokens: Tokens of the largest micro-batch.
        num_targets: Its tokens that carry loss.
        num_validation_tokens: Tokens of the largest validation pass; 0 where there is none.
        value_bytes: Bytes of a value in the compute type.
        is_flash: Whether a flash kernel computes attention.
        has_dropout: Whether LoRA drops a share of its inputs.
        num_recomputed: Blocks that recompute.
        pages_optimizer: Whether the optimizer state can page to host memory.
        uses_engine: Whether dsft's engine computes the blocks.
    """

    shape: ModelShape
    rank: int
    num_tokens: int
    num_targets: int
    num_validation_tokens: int = 0
    value_bytes: int = 2
    is_flash: bool = True
    has_dropout: bool = False
    num_recomputed: int = 0
    pages_optimizer: bool = False
    uses_engine: bool = False


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of a training run.

    Attributes:
        terms: What it is made of; they add up to `device_bytes`.
        allocated_bytes: Peak of what PyTorch's allocator has given out.
        reserved_bytes: Peak of what it holds.
        paged_bytes: Optimizer state in pageable memory, as much of it as there is room for on the device.
        paged_out_bytes: The rest of that state, which stays in host memory.
        context_bytes: CUDA's own.
        driver_bytes: The driver's own, there before the run.
        step_bytes: What of `reserved_bytes` a step takes and gives back: activations and what lies idle among them.
        peak_moment: When in a step the peak is.
    """

    terms: tuple[Term, ...]
    allocated_bytes: int
    reserved_bytes: int
    paged_bytes: int
    paged_out_bytes: int
    context_bytes: int
    driver_bytes: int
    step_bytes: int
    peak_moment: str

    @property
    def process_bytes(self) -> int:
        """What the process takes of the device, the paged state that is there included."""
        return self.reserved_bytes + self.paged_bytes + self.context_bytes

    @property
    def device_bytes(self) -> int:
        """What the driver shows as used when nothing else runs."""
        return self.process_bytes + self.driver_bytes

    @property
    def least_process_bytes(self) -> int:
        """What the process can't do without: paged state may go to the host."""
        return self.reserved_bytes + self.context_bytes

    @property
    def most_process_bytes(self) -> int:
        """What the process takes where there is room for all."""
        return self.process_bytes + self.paged_out_bytes


def estimate_training(load: TrainingLoad, card: Card, *, context_bytes: int | None = None) -> TrainingMemory:
    """Estimate the peak memory of a training run.

    Weights, LoRA, gradients and optimizer state are there all the time; above them stands the largest of four moments
    of a step: the last block's forward pass, the loss, the backward pass of a block that kept its activations, and that
    of one that recomputes.

    Args:
        load: What a step has to hold.
        card: Where it runs.
        context_bytes: CUDA's own memory where it was measured; None takes the card's record.
    """
    shape, rank, width = load.shape, load.rank, load.value_bytes
    nf4, scales = quantized_bytes(shape)
    other = unquantized_bytes(shape, width)
    workspace = workspace_bytes(card.capability)
    lora = lora_bytes(shape, rank)
    on_device, paged = optimizer_state_bytes(shape, rank, pages=load.pages_optimizer)
    step = _step(load)
    lora_copy, dequantized, tables = _engine_terms(load)
    allocated = nf4 + scales + other + workspace + 2 * lora + on_device + step.peak_bytes
    allocated += lora_copy.num_bytes + dequantized.num_bytes + tables.num_bytes
    idle = loading_holes_bytes(shape) + step.idle_bytes
    reserved = -(-(allocated + idle) // (2 * MIB)) * 2 * MIB  # PyTorch's expandable segments grow by 2 MiB at least
    context = card.context_bytes if context_bytes is None else context_bytes
    paged_in = max(0, min(paged, card.usable_bytes - reserved - context))
    kept_blocks = shape.num_blocks - load.num_recomputed
    linears = shape.num_linear_weights
    table = "once (tied)" if shape.is_tied else "twice (embedding and head)"
    values = shape.num_lora_weights(rank)
    terms = (
        Term("NF4 weights", nf4, f"{linears:,} weights x 4 bits", Group.WEIGHTS),
        Term("scales of the weights", scales, "8 bits for each 64 weights, 32 for each 256 of those", Group.WEIGHTS),
        Term(
            "embedding, head, norms",
            other,
            f"{shape.vocab_size:,} x {shape.hidden_size:,} {table}, and norms, x {width} bytes",
            Group.WEIGHTS,
        ),
        tables,
        Term("LoRA weights", lora, f"{values:,} x 4 bytes", Group.LORA),
        Term("LoRA gradients", lora, f"{values:,} x 4 bytes", Group.LORA),
        lora_copy,
        Term("optimizer state", on_device, "2 x 4 bytes for each LoRA weight", Group.LORA),
        Term("optimizer state, paged", paged_in, "2 x 4 bytes for each LoRA weight", Group.LORA),
        Term(
            "kept activations",
            step.kept_bytes,
            f"{kept_blocks} of {shape.num_blocks} blocks keep theirs, {load.num_recomputed} only their input, "
            f"for {load.num_tokens:,} tokens",
            Group.ACTIVATIONS,
        ),
        Term("largest transient", step.peak_bytes - step.kept_bytes, step.moment, Group.ACTIVATIONS),
        dequantized,
        Term("cuBLAS workspaces", workspace, "one for each of two threads", Group.OVERHEAD),
        Term("idle in the allocator", reserved - allocated, "between tensors, and rounding", Group.OVERHEAD),
        Term("CUDA context and kernels", context, _origin(card, context_bytes), Group.OVERHEAD),
        Term("kept by the driver", card.driver_bytes, _origin(card, None), Group.OVERHEAD),
    )
    return TrainingMemory(
        terms=tuple(term for term in terms if term.num_bytes),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        paged_bytes=paged_in,
        paged_out_bytes=paged - paged_in,
        context_bytes=context,
        driver_bytes=card.driver_bytes,
        step_bytes=step.peak_bytes + step.idle_bytes,
        peak_moment=step.moment,
    )


def _engine_terms(load: TrainingLoad) -> tuple[Term, Term, Term]:
    """Return what the engine holds all the time beside the model: LoRA's copy, its workspace, its tables."""
    shape, rank, width = load.shape, load.rank, load.value_bytes
    values = copy = tables = 0
    if load.uses_engine:
        values, tables = dequantization_values(shape, rank), table_bytes(shape, width)
        copy = lora_bytes(shape, rank) * width // 4 if width < 4 else 0  # in float32 the weights serve themselves
    return (
        Term("LoRA weights, 16-bit copy", copy, f"{shape.num_lora_weights(rank):,} x {width} bytes", Group.LORA),
        Term(
            "dequantization workspace",
            in_blocks(width * values) if values else 0,
            f"{values:,} x {width} bytes",
            Group.OVERHEAD,
        ),
        Term("engine's tables", tables, "offsets of scales in 32 bits, joined biases", Group.WEIGHTS),
    )


def _origin(card: Card, measured: int | None) -> str:
    if measured is not None:
        return "measured on this card now"
    return f"measured on an {card.name}" if card.is_measured else f"{card.name}: scaled from an H100's, not measured"


def loading_holes_bytes(shape: ModelShape) -> int:
    """Return what lies idle between the weights after they were quantized one after the other."""
    return LOADING_HOLES_BYTES + round(LOADING_HOLES_SHARE * sum(quantized_bytes(shape)))


def lora_bytes(shape: ModelShape, rank: int) -> int:
    """Return the bytes of the one float32 tensor that all LoRA weights lie in, each from a multiple of 128 values on.

    Their gradients, and each moment of the optimizer, are a tensor of that size too.
    """
    sizes = (4 * rank * size for linear in shape.block_linears for size in (linear.num_inputs, linear.num_outputs))
    return shape.num_blocks * sum(in_blocks(num_bytes) for num_bytes in sizes)


def optimizer_state_bytes(shape: ModelShape, rank: int, *, pages: bool) -> tuple[int, int]:
    """Return the bytes of AdamW's two float32 moments (arXiv:1711.05101) on the device, and in pageable memory."""
    moment_bytes = lora_bytes(shape, rank)
    if pages and moment_bytes >= 4 * PAGED_FROM_VALUES:
        return 0, 2 * paged_tensor_bytes(moment_bytes)
    return 2 * moment_bytes, 0


def paged_tensor_bytes(num_bytes: int) -> int:
    """Return what a tensor of managed memory takes of the device, as the driver was seen to round it.

    Below 2 MiB to a power of two, above to whole 512 KiB.
    """
    if num_bytes < 2 * MIB:
        return 1 << (num_bytes - 1).bit_length()
    return -(-num_bytes // (MIB // 2)) * (MIB // 2)


@dataclass(frozen=True)
class _Step:
    """The largest moment of a step.

    Attributes:
        peak_bytes: Most alive at once, above what is there all the time.
        kept_bytes: What of it are activations kept for the backward pass.
        idle_bytes: What the allocator holds beyond that: the moment that needs most of it may be another one.
        moment: When most is alive.
    """

    peak_bytes: int
    kept_bytes: int
    idle_bytes: int
    moment: str


def _step(load: TrainingLoad) -> _Step:
    shape, width = load.shape, load.value_bytes
    size = PassSize(load.num_tokens, load.num_targets, load.rank, width, load.is_flash, load.has_dropout)
    state = in_blocks(width * load.num_tokens * shape.hidden_size)
    recomputed, kept_blocks = load.num_recomputed, shape.num_blocks - load.num_recomputed
    path = ENGINE_PATH if load.uses_engine else PLAIN_PATH
    forward, backward = path.block_forward(shape, size), path.block_backward(shape, size)
    again, loss = path.recomputed_backward(shape, size), path.loss_and_head(shape, size)
    # Sines and cosines of the positions, for all blocks.
    rotation = 2 * in_blocks(width * load.num_tokens * shape.head_dim)
    inputs = recomputed * state
    kept = kept_blocks * forward.kept_bytes
    if kept_blocks == shape.num_blocks and not load.uses_engine:
        kept -= _unneeded_in_first_block(shape, size)
    moments = {"the loss": inputs + kept + loss.peak_bytes}
    if kept_blocks:
        before_last = inputs + max(0, kept - forward.kept_bytes)
        moments["the last block's forward pass"] = before_last + state + forward.peak_bytes
        moments["the backward pass of the last block"] = inputs + kept + backward.peak_bytes
    if recomputed:
        # In the engine the gradient that comes in becomes the block's own, but for the last block's.
        copied = state if load.uses_engine and not kept_blocks else 0
        moments["a block's second forward pass and its backward pass"] = inputs + state + copied + again.peak_bytes
    longest = PassSize(load.num_validation_tokens, load.num_validation_tokens, load.rank, width, load.is_flash)
    if longest.num_tokens > load.num_tokens:
        first = in_blocks(width * longest.num_tokens * shape.hidden_size)
        moments["a validation pass"] = first + path.recomputed_forward(shape, longest).peak_bytes
    moment = max(moments, key=lambda name: moments[name])
    if load.uses_engine:
        forward_idle = round(ENGINE_FORWARD_FRAGMENTATION * forward.peak_bytes)
        recompute_idle = round(ENGINE_RECOMPUTE_HOLES_SHARE * sum(quantized_bytes(shape)))
    else:
        forward_idle = round(FORWARD_FRAGMENTATION * forward.peak_bytes)
        recompute_idle = round(RECOMPUTE_FRAGMENTATION * again.peak_bytes)
    live_kept = inputs + (0 if "second" in moment else kept)
    held = max(
        num_bytes + (recompute_idle if "second" in name else forward_idle) for name, num_bytes in moments.items()
    )
    return _Step(
        peak_bytes=moments[moment] + rotation,
        kept_bytes=0 if "validation" in moment else live_kept,
        idle_bytes=held - moments[moment],
        moment=moment,
    )


def _unneeded_in_first_block(shape: ModelShape, size: PassSize) -> int:
    # Nothing before the first block is trained, so its first norm keeps nothing for a gradient at its input.
    if shape.family == "olmo2":  # its first norm comes after attention
        return 0
    values = size.num_tokens * shape.hidden_size
    if shape.family == "starcoder2":
        return in_blocks(size.value_bytes * values) + in_blocks(2 * 4 * size.num_tokens)
    return in_blocks(4 * values) + in_blocks(4 * size.num_tokens)
