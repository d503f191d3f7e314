"""The sizes of a model that decide its memory, read from its config.json; no weights, no torch."""

from dataclasses import dataclass
from typing import Any

from dsft.core.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        name: Its name in the model.
        num_inputs: Values in.
        num_outputs: Values out.
        has_bias: Whether it adds a bias.
    """

    name: str
    num_inputs: int
    num_outputs: int
    has_bias: bool = False

    @property
    def num_weights(self) -> int:
        """Weights without the bias."""
        return self.num_inputs * self.num_outputs


@dataclass(frozen=True)
class ModelShape:
    """The shape of a decoder-only model.

    Attributes:
        family: `model_type` of config.json.
        hidden_size: Values of a token between blocks.
        num_blocks: Blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; fewer than `num_heads` where heads are grouped (GQA, arXiv:2305.13245).
        head_dim: Values of a head.
        intermediate_size: Values between the two halves of the MLP.
        vocab_size: Rows of the embedding.
        is_tied: Whether the output head is the embedding.
        attention_linears: Linear layers before attention, in the order they run.
        output_linear: The one after attention.
        mlp_linears: Linear layers of the MLP, the one back to `hidden_size` last.
        norm_weights: Weights in the norms of one block.
        normalized_head_values: Values of q and k that a norm of their own passes, for a token; 0 where there is none.
    """

    family: str
    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool
    attention_linears: tuple[Linear, ...]
    output_linear: Linear
    mlp_linears: tuple[Linear, ...]
    norm_weights: int
    normalized_head_values: int

    @property
    def block_linears(self) -> tuple[Linear, ...]:
        """All linear layers of a block, in the order they run; these are quantized and carry LoRA."""
        return (*self.attention_linears, self.output_linear, *self.mlp_linears)

    @property
    def num_query_values(self) -> int:
        """Values of all query heads of a token."""
        return self.num_heads * self.head_dim

    @property
    def num_kv_values(self) -> int:
        """Values of all key heads of a token; as many are the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_linear_weights(self) -> int:
        """Weights of the linear layers of all blocks."""
        return self.num_blocks * sum(linear.num_weights for linear in self.block_linears)

    @property
    def num_parameters(self) -> int:
        """All weights of the model; tied ones once."""
        biases = sum(linear.num_outputs for linear in self.block_linears if linear.has_bias)
        table = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        return self.num_linear_weights + self.num_blocks * (biases + self.norm_weights) + self.final_norm + table

    @property
    def final_norm(self) -> int:
        """Weights of the norm before the output head."""
        return self.hidden_size * (2 if self.family == "starcoder2" else 1)

    def num_lora_weights(self, rank: int) -> int:
        """Return the trained weights: r·(inputs + outputs) for each linear layer (arXiv:2106.09685, section 4)."""
        return self.num_blocks * sum(rank * (linear.num_inputs + linear.num_outputs) for linear in self.block_linears)


_LLAMA = {"model_type": "llama", "vocab_size": 32256, "max_position_embeddings": 16384, "tie_word_embeddings": False}

BUILTIN_CONFIGS: dict[str, dict[str, Any]] = {
    f"deepseek-ai/deepseek-coder-{size}-{kind}": _LLAMA | sizes
    for size, sizes in {
        "1.3b": {
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 5504,
        },
        "6.7b": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
        },
        "33b": {
            "hidden_size": 7168,
            "num_hidden_layers": 62,
            "num_attention_heads": 56,
            "num_key_value_heads": 8,
            "intermediate_size": 19200,
        },
    }.items()
    for kind in ("base", "instruct")
}
"""The sizes in the published config.json of DeepSeek-Coder (arXiv:2401.14196, table 2), for estimates without a hub."""


_MOST_BLOCKS = 1000
"""Plans are tried with every number of recomputed blocks; published models have at most some 130."""

_LARGEST_SIZE = 10_000_000
"""Far above any vocabulary, the largest size there is."""


def read_model_shape(config: dict[str, Any], name: str) -> ModelShape:
    """Read a model's shape from the content of its config.json.

    Args:
        config: The content.
        name: What messages call the model.

    Raises:
        ModelError: A size is missing, no positive whole number or beyond any model's, heads can't be divided as it
            says, or the family is one dsft has no arithmetic for.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ModelError(
            f"{name} is of the family {family}, whose memory dsft can't calculate.",
            f"Families it knows: {', '.join(sorted(FAMILIES))}.",
        )

    def wrong(found: str) -> ModelError:
        return ModelError(f"config.json of {name}: {found}.", "Copy the model again.")

    def size(key: str, default: int | None = None, most: int = _LARGEST_SIZE) -> int:
        value = config.get(key, default)
        if value is None and default is not None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise wrong(f"{key} must be a whole number of at least 1, and is {value!r}")
        if value > most:
            raise wrong(f"{key} is more than {most:,}, which no model has")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise wrong(f"hidden_size {hidden} can't be divided among {heads} heads (num_attention_heads)")
    head_dim = size("head_dim", hidden // heads)
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise wrong(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    is_tied = config.get("tie_word_embeddings", family in ("starcoder2", "smollm3"))
    if not isinstance(is_tied, bool):
        raise wrong(f"tie_word_embeddings must be true or false, and is {is_tied!r}")
    intermediate = size("intermediate_size")
    attention, output, mlp = _linears(family, config, hidden, heads * head_dim, kv_heads * head_dim, intermediate)
    has_head_norms = family in ("qwen3", "olmo2")
    head_norm_weights = {"qwen3": 2 * head_dim, "olmo2": (heads + kv_heads) * head_dim}.get(family, 0)
    return ModelShape(
        family=family,
        hidden_size=hidden,
        num_blocks=size("num_hidden_layers", most=_MOST_BLOCKS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=size("vocab_size"),
        is_tied=is_tied,
        attention_linears=attention,
        output_linear=output,
        mlp_linears=mlp,
        norm_weights=hidden * (4 if family == "starcoder2" else 2) + head_norm_weights,
        normalized_head_values=(heads + kv_heads) * head_dim if has_head_norms else 0,
    )


FAMILIES = frozenset({"granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"})


def _linears(
    family: str, config: dict[str, Any], hidden: int, queries: int, keys: int, intermediate: int
) -> tuple[tuple[Linear, ...], Linear, tuple[Linear, ...]]:
    bias = {"qwen2": True, "starcoder2": bool(config.get("use_bias", True))}.get(
        family, bool(config.get("attention_bias", False))
    )
    mlp_bias = bool(config.get("use_bias", True)) if family == "starcoder2" else bool(config.get("mlp_bias", False))
    output = Linear("o_proj", queries, hidden, bias and family != "qwen2")
    if family == "phi3":
        attention: tuple[Linear, ...] = (Linear("qkv_proj", hidden, queries + 2 * keys),)
        mlp: tuple[Linear, ...] = (
            Linear("gate_up_proj", hidden, 2 * intermediate),
            Linear("down_proj", intermediate, hidden),
        )
        return attention, output, mlp
    attention = (
        Linear("q_proj", hidden, queries, bias),
        Linear("k_proj", hidden, keys, bias),
        Linear("v_proj", hidden, keys, bias),
    )
    if family == "starcoder2":
        mlp = (Linear("c_fc", hidden, intermediate, mlp_bias), Linear("c_proj", intermediate, hidden, mlp_bias))
    else:
        mlp = (
            Linear("gate_proj", hidden, intermediate, mlp_bias),
            Linear("up_proj", hidden, intermediate, mlp_bias),
            Linear("down_proj", intermediate, hidden, mlp_bias),
        )
    return attention, output, mlp


def quantized_bytes(shape: ModelShape) -> tuple[int, int]:
    """Return the bytes of the NF4 weights and of their scales, over all blocks.

    A weight is 4 bits. Blocks of 64 weights share a scale, kept in 8 bits; blocks of 256 scales share a float32
    (QLoRA, arXiv:2305.14314, section 3, double quantization). Beside them each layer has the tables of both codes
    (16 and 256 float32) and an offset.
    """
    weights = scales = 0
    for linear in shape.block_linears:
        count = linear.num_weights
        num_scales = -(-count // NF4_BLOCK)
        weights += in_blocks(-(-count // 2))
        scales += in_blocks(num_scales) + in_blocks(4 * -(-num_scales // SCALE_BLOCK))
        scales += in_blocks(4 * 256) + in_blocks(4 * 16) + in_blocks(4)
    return shape.num_blocks * weights, shape.num_blocks * scales


def unquantized_bytes(shape: ModelShape, bytes_per_value: int) -> int:
    """Return the bytes of embedding, output head, norms and biases, which stay in the compute type."""
    table = in_blocks(shape.vocab_size * shape.hidden_size * bytes_per_value) * (1 if shape.is_tied else 2)
    biases = sum(in_blocks(linear.num_outputs * bytes_per_value) for linear in shape.block_linears if linear.has_bias)
    norms = in_blocks(shape.norm_weights * bytes_per_value)
    return table + shape.num_blocks * (biases + norms) + in_blocks(shape.final_norm * bytes_per_value)


NF4_BLOCK = 64
"""Weights that share a scale in bitsandbytes."""

SCALE_BLOCK = 256
"""Scales that share a float32 in bitsandbytes' double quantization."""

ALLOCATION_UNIT_BYTES = 512
"""PyTorch's allocator rounds each request up to this."""


def in_blocks(num_bytes: int) -> int:
    """Return the bytes that an allocation takes."""
    return max(1, -(-num_bytes // ALLOCATION_UNIT_BYTES)) * ALLOCATION_UNIT_BYTES
