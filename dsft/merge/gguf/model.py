"""A model's architecture in GGUF's terms: its keys, its tensors, and what llama.cpp can't compute as transformers does.

Names and layouts are those that llama.cpp reads (its `gguf-py/gguf/constants.py` and `src/models/`, 2025).
"""

from dataclasses import dataclass
from typing import Any

from dsft.core.errors import ModelError
from dsft.core.memory.model_shape import ModelShape, read_model_shape
from dsft.merge.gguf.rope import GgufRope, read_rope, rope_type


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that the architecture has.

    Attributes:
        gguf_name: Its name in GGUF.
        shape: Its shape in the checkpoint and in GGUF, as PyTorch counts dimensions.
        rotary_heads: Heads whose rows are reordered; 0 where rows stay as they are.
    """

    gguf_name: str
    shape: tuple[int, ...]
    rotary_heads: int = 0


@dataclass(frozen=True)
class GgufModel:
    """A model that llama.cpp computes as transformers does.

    Attributes:
        architecture: GGUF's name for it.
        shape: Its sizes.
        context_length: Most positions.
        norm_epsilon: Epsilon of its RMS norms.
        rope: Its rotary embedding.
        tensors: What a checkpoint of it holds, by name there; `lm_head.weight` may be missing where it is tied.
    """

    architecture: str
    shape: ModelShape
    context_length: int
    norm_epsilon: float
    rope: GgufRope
    tensors: dict[str, ExpectedTensor]


@dataclass(frozen=True)
class _Family:
    architecture: str
    is_interleaved: bool
    """Whether the two values that are rotated together lie side by side; transformers has them half a head apart."""
    has_rope_divisors: bool


_FAMILIES = {
    "llama": _Family("llama", True, True),
    "mistral": _Family("llama", True, True),
    "qwen2": _Family("qwen2", False, False),
    "qwen3": _Family("qwen3", False, False),
}

_LINEARS = {
    "q_proj": ("self_attn.q_proj", "attn_q"),
    "k_proj": ("self_attn.k_proj", "attn_k"),
    "v_proj": ("self_attn.v_proj", "attn_v"),
    "o_proj": ("self_attn.o_proj", "attn_output"),
    "gate_proj": ("mlp.gate_proj", "ffn_gate"),
    "up_proj": ("mlp.up_proj", "ffn_up"),
    "down_proj": ("mlp.down_proj", "ffn_down"),
}


def read_gguf_model(model_config: dict[str, Any]) -> GgufModel:
    """Read a model's architecture from the content of its config.json.

    Raises:
        ModelError: llama.cpp has no such model, or would compute it otherwise than transformers.
    """
    family = _FAMILIES.get(str(model_config.get("model_type")))
    if family is None:
        raise ModelError(
            f"dsft writes no GGUF of the model family {model_config.get('model_type')}.",
            f"Families it writes: {', '.join(sorted(_FAMILIES))}. Merge without a GGUF file.",
        )
    shape = read_model_shape(model_config, "the merged model")
    _refuse_wrong_sizes(shape)
    kind = rope_type(model_config)
    if kind not in {"default", "none", "linear", "llama3"}:
        raise ModelError(
            f"The model scales its rotary embedding by the rule {kind!r}, of which dsft writes no GGUF.",
            "Merge without a GGUF file.",
        )
    # transformers' own defaults stand for what config.json leaves out.
    config = _as_transformers_reads_it(model_config)
    if config.hidden_act != "silu":
        raise ModelError(
            f"The MLP's activation is {config.hidden_act!r}, and llama.cpp computes this architecture with silu.",
            "Merge without a GGUF file.",
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ModelError(
            f"The model's attention sees {window} tokens back, and llama.cpp computes this architecture without that.",
            "Merge without a GGUF file.",
        )
    return GgufModel(
        architecture=family.architecture,
        shape=shape,
        context_length=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope=read_rope(config.rope_parameters, shape.head_dim, family.has_rope_divisors),
        tensors=_expected_tensors(shape, family.is_interleaved),
    )


def _as_transformers_reads_it(model_config: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    settings = {key: value for key, value in model_config.items() if key != "model_type"}
    return AutoConfig.for_model(model_config["model_type"], **settings)


def _refuse_wrong_sizes(shape: ModelShape) -> None:
    if shape.head_dim % 2:
        raise ModelError(f"Heads of {shape.head_dim} values can't be rotated in pairs.", "Merge without a GGUF file.")
    if shape.family == "qwen2" and shape.num_query_values != shape.hidden_size:
        raise ModelError(
            f"The {shape.num_heads} heads of {shape.head_dim} values don't make up the hidden size "
            f"{shape.hidden_size}, as llama.cpp's qwen2 needs.",
            "Merge without a GGUF file.",
        )
    if shape.family == "qwen3" and shape.output_linear.has_bias:
        raise ModelError(
            "The attention has biases (attention_bias), which llama.cpp's qwen3 does not read.",
            "Merge without a GGUF file.",
        )


def _expected_tensors(shape: ModelShape, is_interleaved: bool) -> dict[str, ExpectedTensor]:
    table = (shape.vocab_size, shape.hidden_size)
    tensors = {"model.embed_tokens.weight": ExpectedTensor("token_embd.weight", table)}
    rotary_heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads} if is_interleaved else {}
    for block in range(shape.num_blocks):
        source, target = f"model.layers.{block}", f"blk.{block}"
        norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
        for name, gguf_name in norms.items():
            tensors[f"{source}.{name}.weight"] = ExpectedTensor(f"{target}.{gguf_name}.weight", (shape.hidden_size,))
        if shape.family == "qwen3":
            for name in ("q_norm", "k_norm"):
                tensors[f"{source}.self_attn.{name}.weight"] = ExpectedTensor(
                    f"{target}.attn_{name}.weight", (shape.head_dim,)
                )
        for linear in shape.block_linears:
            path, gguf_name = _LINEARS[linear.name]
            heads = rotary_heads.get(linear.name, 0)
            tensors[f"{source}.{path}.weight"] = ExpectedTensor(
                f"{target}.{gguf_name}.weight", (linear.num_outputs, linear.num_inputs), heads
            )
            if linear.has_bias:
                tensors[f"{source}.{path}.bias"] = ExpectedTensor(
                    f"{target}.{gguf_name}.bias", (linear.num_outputs,), heads
                )
    tensors["model.norm.weight"] = ExpectedTensor("output_norm.weight", (shape.hidden_size,))
    tensors[HEAD] = ExpectedTensor("output.weight", table)
    return tensors


HEAD = "lm_head.weight"
