"""The memory of generating text with a model, term by term, as `dsft infer` loads it: the adapter beside the weights.

None of it has been compared with a run yet: all of it is predicted.
"""

from dataclasses import dataclass

from dsft.core.memory.cards import Card, workspace_bytes
from dsft.core.memory.model_shape import ModelShape, in_blocks, quantized_bytes, unquantized_bytes
from dsft.core.memory.training import LOADING_HOLES_BYTES, LOADING_HOLES_SHARE, MIB, Group, Term

VALUE_BYTES = 2
"""Of weights, arithmetic and KV cache: bf16 or fp16."""


@dataclass(frozen=True)
class GenerationLoad:
    """What generation has to hold.

    Attributes:
        shape: The model.
        rank: LoRA rank of the adapter; 0 where there is none (a merged model).
        num_context_tokens: Tokens of prompt and answer together; the prompt may be nearly all of them.
        is_4bit: Whether the linear layers are in NF4, else in 16 bits.
    """

    shape: ModelShape
    rank: int
    num_context_tokens: int
    is_4bit: bool


@dataclass(frozen=True)
class GenerationMemory:
    """The memory of generation.

    Attributes:
        terms: What it is made of; they add up to `process_bytes`.
        allocated_bytes: Peak of what PyTorch's allocator has given out.
        process_bytes: What the process takes of the device.
    """

    terms: tuple[Term, ...]
    allocated_bytes: int
    process_bytes: int


def estimate_generation(load: GenerationLoad, card: Card, *, context_bytes: int | None = None) -> GenerationMemory:
    """Predict the peak memory of generating one answer.

    Args:
        load: What is held.
        card: Where it runs.
        context_bytes: CUDA's own memory where it was measured; None takes the card's record.
    """
    shape = load.shape
    weights = _weight_terms(shape, load.is_4bit)
    values = shape.num_lora_weights(load.rank)
    cache = cache_bytes(shape, load.num_context_tokens)
    per_token = cache_bytes(shape, 1)
    workspace = workspace_bytes(card.capability)
    inside = (
        *weights,
        Term("adapter", 4 * values, f"{values:,} LoRA weights x 4 bytes, not merged", Group.LORA),
        Term("KV cache", cache, f"{per_token:,} bytes a token x {load.num_context_tokens:,}", Group.ACTIVATIONS),
        Term("prompt's pass", prefill_bytes(load), "the largest layer, for a prompt of that length", Group.ACTIVATIONS),
        Term("cuBLAS workspaces", workspace, "two", Group.OVERHEAD),
    )
    allocated = sum(term.num_bytes for term in inside)
    quantized = sum(quantized_bytes(shape)) if load.is_4bit else 0
    holes = LOADING_HOLES_BYTES + round(LOADING_HOLES_SHARE * quantized)
    idle = -(-(allocated + holes) // (2 * MIB)) * 2 * MIB - allocated
    context = card.context_bytes if context_bytes is None else context_bytes
    origin = f"record of the {card.name}" if context_bytes is None else "measured"
    outside = (
        Term("idle in the allocator", idle, "left between the weights while loading, and rounding", Group.OVERHEAD),
        Term(
            "CUDA context and kernels",
            context,
            origin,
            Group.OVERHEAD,
        ),
    )
    terms = tuple(term for term in (*inside, *outside) if term.num_bytes)
    return GenerationMemory(terms, allocated, allocated + idle + context)


def cache_bytes(shape: ModelShape, num_tokens: int) -> int:
    """Return the bytes of the KV cache: a key and a value for each token, block and key head."""
    return 2 * shape.num_blocks * shape.num_kv_values * VALUE_BYTES * num_tokens


def prefill_bytes(load: GenerationLoad) -> int:
    """Return the transient memory of the pass over the prompt.

    It is largest in the last layer of the MLP: alive are the block's input, what went into the layer and what comes
    out, all in 16 bits, with an adapter its float32 copy of the input and its float32 product, and with 4 bits the
    layer's weights, unpacked.
    """
    shape, tokens = load.shape, load.num_context_tokens
    linear = max(shape.mlp_linears, key=lambda layer: layer.num_inputs + layer.num_outputs)
    transient = VALUE_BYTES * tokens * (shape.hidden_size + linear.num_inputs + linear.num_outputs)
    if load.rank:
        transient += 4 * tokens * (linear.num_inputs + linear.num_outputs)
    if load.is_4bit:
        transient += VALUE_BYTES * linear.num_weights
    return in_blocks(transient)


def _weight_terms(shape: ModelShape, is_4bit: bool) -> tuple[Term, ...]:
    if not is_4bit:
        count = shape.num_parameters
        return (Term("weights", VALUE_BYTES * count, f"{count:,} x {VALUE_BYTES} bytes", Group.WEIGHTS),)
    nf4, scales = quantized_bytes(shape)
    other = unquantized_bytes(shape, VALUE_BYTES)
    return (
        Term("NF4 weights", nf4, f"{shape.num_linear_weights:,} weights x 4 bits", Group.WEIGHTS),
        Term("scales of the weights", scales, "8 bits for each 64 weights, 32 for each 256 of those", Group.WEIGHTS),
        Term("embedding, head, norms", other, f"x {VALUE_BYTES} bytes", Group.WEIGHTS),
    )
