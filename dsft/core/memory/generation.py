"""The memory of generating text with a model, term by term, as `dsft infer` loads it: the adapter beside the weights.

What PyTorch allocates in the decoder for CUDA was compared with runs (docs/benchmarks/memory.md); transformers' path,
which other families and older cards take, was not.
"""

from dataclasses import dataclass

from dsft.core.memory.cards import Card, workspace_bytes
from dsft.core.memory.model_shape import (
    NF4_BLOCK,
    SCALE_BLOCK,
    ModelShape,
    in_blocks,
    quantized_bytes,
    unquantized_bytes,
)
from dsft.core.memory.prompt_pass import MAX_PASS_TOKENS, fuse_linears, pad_rank, prompt_bytes
from dsft.core.memory.training import LOADING_HOLES_BYTES, LOADING_HOLES_SHARE, MIB, Group, Term

VALUE_BYTES = 2
"""Of weights, arithmetic and KV cache: bf16 or fp16."""

DECODED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
DECODED_HEAD_SIZES = frozenset({32, 64, 128, 256})
DECODED_MULTIPLE = 64
AMPERE = (8, 0)
"""What `dsft/infer/decoding` has a decoder for CUDA for: families, numbers of a head, widths in multiples of so many,
and cards from this compute capability on."""

CAPACITY_STEP = 512
"""The cache of that decoder has room for a multiple of so many tokens."""


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
    values = shape.num_lora_weights(load.rank)
    inside = (
        *_weight_terms(shape, load.is_4bit),
        Term("adapter", 4 * values, f"{values:,} LoRA weights x 4 bytes, not merged", Group.LORA),
        *(_decoder_terms(load) if has_decoder(shape, card) else _plain_terms(load)),
        Term("cuBLAS workspaces", workspace_bytes(card.capability), "two", Group.OVERHEAD),
    )
    allocated = sum(term.num_bytes for term in inside)
    quantized = sum(quantized_bytes(shape)) if load.is_4bit else 0
    holes = LOADING_HOLES_BYTES + round(LOADING_HOLES_SHARE * quantized)
    idle = -(-(allocated + holes) // (2 * MIB)) * 2 * MIB - allocated
    context = card.context_bytes if context_bytes is None else context_bytes
    origin = f"record of the {card.name}" if context_bytes is None else "measured"
    outside = (
        Term("idle in the allocator", idle, "left between the weights while loading, and rounding", Group.OVERHEAD),
        Term("CUDA context and kernels", context, origin, Group.OVERHEAD),
    )
    terms = tuple(term for term in (*inside, *outside) if term.num_bytes)
    return GenerationMemory(terms, allocated, allocated + idle + context)


def has_decoder(shape: ModelShape, card: Card) -> bool:
    """Return whether the decoder for CUDA runs a model of this shape on a card; else transformers' modules do."""
    return (
        shape.family in DECODED_FAMILIES
        and shape.head_dim in DECODED_HEAD_SIZES
        and shape.hidden_size % DECODED_MULTIPLE == 0
        and shape.intermediate_size % DECODED_MULTIPLE == 0
        and card.capability >= AMPERE
    )


def cache_bytes(shape: ModelShape, num_tokens: int) -> int:
    """Return the bytes of the KV cache: a key and a value for each token, block and key head."""
    return 2 * shape.num_blocks * shape.num_kv_values * VALUE_BYTES * num_tokens


def capacity_for(num_tokens: int) -> int:
    """Return the tokens that the decoder's cache has room for: one more than needed, in whole steps."""
    return -(-(num_tokens + 1) // CAPACITY_STEP) * CAPACITY_STEP


def factor_bytes(shape: ModelShape, rank: int) -> int:
    """Return the bytes of the adapter's factors, which the decoder holds in 16 bits with their rank padded."""
    return VALUE_BYTES * shape.num_lora_weights(pad_rank(rank)) if rank else 0


def joined_bytes(shape: ModelShape, *, is_4bit: bool) -> int:
    """Return what the decoder makes anew of a model's biases and scales, where layers are laid side by side.

    Biases are joined. With 4 bits each group of scales has its offset in float32, and the groups' own scales are joined
    where no group reaches over from one layer to the next. Weights are laid side by side too, but not there twice.
    """
    total = 0
    for linears in fuse_linears(shape):
        if any(linear.has_bias for linear in linears):
            total += in_blocks(VALUE_BYTES * sum(linear.num_outputs for linear in linears))
        if not is_4bit:
            continue
        num_scales = [-(-linear.num_weights // NF4_BLOCK) for linear in linears]
        group_bytes = [4 * -(-count // SCALE_BLOCK) for count in num_scales]
        if len(linears) > 1 and all(count % SCALE_BLOCK == 0 for count in num_scales[:-1]):
            total += 2 * in_blocks(sum(group_bytes))
        else:
            total += sum(map(in_blocks, group_bytes))
    return shape.num_blocks * total


def plain_pass_bytes(load: GenerationLoad) -> int:
    """Return the transient memory of the pass over the prompt in transformers' modules.

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


def _decoder_terms(load: GenerationLoad) -> tuple[Term, ...]:
    shape, num_tokens = load.shape, load.num_context_tokens
    capacity = capacity_for(num_tokens)
    num_read = min(num_tokens, MAX_PASS_TOKENS)
    factors = f"the same in 16 bits for dsft's decoder, of rank {pad_rank(load.rank)}" if load.rank else ""
    room = (
        f"{cache_bytes(shape, 1):,} bytes a token x {capacity:,}, room for {num_tokens:,} in steps of {CAPACITY_STEP}"
    )
    rotations = f"2 x {capacity:,} x {shape.head_dim} x {VALUE_BYTES} bytes"
    read = f"by dsft's decoder, a prompt of nearly that length, {num_read:,} tokens at once"
    return (
        Term("adapter's factors", factor_bytes(shape, load.rank), factors, Group.LORA),
        Term("joined scales and biases", joined_bytes(shape, is_4bit=load.is_4bit), "for its kernels", Group.WEIGHTS),
        Term("KV cache", cache_bytes(shape, capacity), room, Group.ACTIVATIONS),
        Term("cosines and sines", 2 * capacity * shape.head_dim * VALUE_BYTES, rotations, Group.ACTIVATIONS),
        Term(
            "prompt's pass",
            prompt_bytes(shape, load.rank, num_tokens, is_4bit=load.is_4bit),
            read,
            Group.ACTIVATIONS,
        ),
    )


def _plain_terms(load: GenerationLoad) -> tuple[Term, ...]:
    shape, num_tokens = load.shape, load.num_context_tokens
    room = f"{cache_bytes(shape, 1):,} bytes a token x {num_tokens:,}"
    read = "by transformers' modules, the widest layer for a prompt of that length"
    return (
        Term("KV cache", cache_bytes(shape, num_tokens), room, Group.ACTIVATIONS),
        Term("prompt's pass", plain_pass_bytes(load), read, Group.ACTIVATIONS),
    )


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
