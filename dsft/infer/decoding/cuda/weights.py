"""Taking a Llama-like model of transformers apart for decoding: which weights, in which order, and what it can't do.

The model stays whole and usable: weights are laid side by side in new storage, and its modules point into that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dsft.infer.decoding.cuda.products import FusedLinear, Nf4Rows, Update, pad_rank

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_STATIC_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
_BLOCK = 64
_GROUP_BLOCKS = 256
_HEAD_SIZES = frozenset({32, 64, 128, 256})


class UnsupportedModelError(Exception):
    """A model that this decoder does not run; the message is a reason that goes on after "because"."""


@dataclass(frozen=True)
class BlockWeights:
    """One block.

    Attributes:
        input_norm: [hidden].
        attention_input: Queries, keys and values side by side.
        query_norm: [head_size], where the family normalizes heads, else None.
        key_norm: The same.
        attention_output: The layer behind attention.
        mlp_norm: [hidden].
        mlp_input: Gate and up side by side.
        mlp_output: Down.
    """

    input_norm: torch.Tensor
    attention_input: FusedLinear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attention_output: FusedLinear
    mlp_norm: torch.Tensor
    mlp_input: FusedLinear
    mlp_output: FusedLinear


@dataclass(frozen=True)
class ModelWeights:
    """A model.

    Attributes:
        embedding: [vocab_size, hidden].
        blocks: In order.
        norm: [hidden].
        head: [vocab_size, hidden].
        rotary: The module that gives cosines and sines of positions.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        head_size: Numbers of a head.
        eps: Of the norms.
    """

    embedding: torch.Tensor
    blocks: tuple[BlockWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor
    rotary: torch.nn.Module
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float


def take_apart(model: "PreTrainedModel | PeftModel") -> ModelWeights:
    """Return a model's weights for decoding.

    Raises:
        UnsupportedModelError: A family, an adapter or a shape that this decoder does not run exactly.
    """
    base = _find_base(model)
    config = base.config
    _check_config(config)
    _check_adapters(model)
    inner = base.model
    head_size = inner.layers[0].self_attn.head_dim
    if head_size not in _HEAD_SIZES:
        raise UnsupportedModelError(f"its heads have {head_size} numbers")
    dtype = inner.norm.weight.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedModelError("it computes in float32")
    return ModelWeights(
        embedding=inner.embed_tokens.weight,
        blocks=tuple(_take_block(layer, dtype) for layer in inner.layers),
        norm=inner.norm.weight,
        head=_plain_weight(base.lm_head, "the output head"),
        rotary=inner.rotary_emb,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size,
        eps=config.rms_norm_eps,
    )


def _find_base(model: "PreTrainedModel | PeftModel") -> Any:
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    family = base.config.model_type
    if family not in FAMILIES or not type(base).__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(f"it is of the family {family}")
    return base


def _check_config(config: Any) -> None:
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"its activation is {config.hidden_act}")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in _STATIC_ROPES:
        raise UnsupportedModelError(f"its rotation changes with the text's length ({rope.get('rope_type')})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("it rotates a part of each head only")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or (window is not None and config.model_type == "mistral"):
        raise UnsupportedModelError("it attends to a window of the text")
    if config.hidden_size % _BLOCK or config.intermediate_size % _BLOCK:
        raise UnsupportedModelError("its layers are not multiples of 64 wide")


def _check_adapters(model: "PreTrainedModel | PeftModel") -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        return
    if len(model.active_adapters) != 1:
        raise UnsupportedModelError("it has several adapters")
    name = model.active_adapters[0]
    settings = model.peft_config[name]
    if settings.modules_to_save or getattr(settings, "trainable_token_indices", None):
        raise UnsupportedModelError("its adapter replaces whole modules")
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        place = path.rpartition(".")[2]
        if not isinstance(module, LoraLayer) or place not in _LINEARS:
            raise UnsupportedModelError(f"its adapter changes {place}")
        if module.merged or module.use_dora.get(name) or name in getattr(module, "lora_variant", {}):
            raise UnsupportedModelError("its adapter is no plain LoRA (it may be DoRA)")
        if name not in module.lora_A or module.lora_bias.get(name):
            raise UnsupportedModelError("its adapter has biases or another form")


_LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


def _take_block(layer: Any, dtype: torch.dtype) -> BlockWeights:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return BlockWeights(
        input_norm=layer.input_layernorm.weight,
        attention_input=_fuse([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
        query_norm=None if query_norm is None else query_norm.weight,
        key_norm=None if key_norm is None else key_norm.weight,
        attention_output=_fuse([attention.o_proj], dtype),
        mlp_norm=layer.post_attention_layernorm.weight,
        mlp_input=_fuse([mlp.gate_proj, mlp.up_proj], dtype),
        mlp_output=_fuse([mlp.down_proj], dtype),
    )


def _plain_weight(module: Any, what: str) -> torch.Tensor:
    if type(module).__name__ != "Linear" or module.bias is not None:
        raise UnsupportedModelError(f"{what} is a {type(module).__name__}, or has a bias")
    weight: torch.Tensor = module.weight
    return weight


def _fuse(modules: Sequence[Any], dtype: torch.dtype) -> FusedLinear:
    from bitsandbytes.nn import Linear4bit

    layers = [getattr(module, "base_layer", module) for module in modules]
    num_inputs = layers[0].in_features
    bias = None
    if any(layer.bias is not None for layer in layers):
        biases = [
            torch.zeros(layer.out_features, device=layer.weight.device) if layer.bias is None else layer.bias
            for layer in layers
        ]
        bias = torch.cat(biases).to(dtype)
    update = _join_updates(modules, layers, dtype)
    kinds = {type(layer) for layer in layers}
    if kinds == {torch.nn.Linear}:
        return FusedLinear(_join_matrices(layers), bias, update, num_inputs, dtype)
    if kinds != {Linear4bit}:
        raise UnsupportedModelError(f"it has layers of the type {sorted(kind.__name__ for kind in kinds)[0]}")
    return FusedLinear(_join_nf4(layers), bias, update, num_inputs, dtype)


def _join_matrices(layers: Sequence[Any]) -> torch.Tensor:
    if len(layers) == 1:
        weight: torch.Tensor = layers[0].weight
        return weight
    joined = torch.cat([layer.weight.data for layer in layers])
    first = 0
    for layer in layers:
        layer.weight.data = joined[first : first + layer.out_features]
        first += layer.out_features
    return joined


def _join_nf4(layers: Sequence[Any]) -> list[Nf4Rows]:
    stretches = [_read_nf4(layer) for layer in layers]
    # Layers can be one stretch where the groups of the scales do not reach over from one to the next.
    is_aligned = all(rows.scales.numel() % _GROUP_BLOCKS == 0 for rows in stretches[:-1])
    is_same = all(
        torch.equal(rows.scale_code, stretches[0].scale_code) and torch.equal(rows.code, stretches[0].code)
        for rows in stretches
    )
    if len(stretches) == 1 or not is_aligned or not is_same:
        return stretches
    joined = Nf4Rows(
        packed=torch.cat([rows.packed for rows in stretches]),
        scales=torch.cat([rows.scales for rows in stretches]),
        scale_code=stretches[0].scale_code,
        group_scales=torch.cat([rows.group_scales for rows in stretches]),
        group_offsets=torch.cat([rows.group_offsets for rows in stretches]),
        code=stretches[0].code,
        num_rows=sum(rows.num_rows for rows in stretches),
    )
    first_byte = first_block = 0
    for layer, rows in zip(layers, stretches, strict=True):
        num_bytes, num_blocks = rows.packed.numel(), rows.scales.numel()
        layer.weight.data = joined.packed[first_byte : first_byte + num_bytes].view(layer.weight.shape)
        layer.weight.quant_state.absmax = joined.scales[first_block : first_block + num_blocks]
        first_byte, first_block = first_byte + num_bytes, first_block + num_blocks
    return [joined]


def _read_nf4(layer: Any) -> Nf4Rows:
    weight, state = layer.weight, layer.weight.quant_state
    if (
        state is None
        or state.quant_type != "nf4"
        or state.blocksize != _BLOCK
        or not state.nested
        or state.state2.blocksize != _GROUP_BLOCKS
        or weight.dtype != torch.uint8
    ):
        raise UnsupportedModelError("it is quantized in another form than NF4 with double quantization")
    return Nf4Rows(
        packed=weight.data.view(-1),
        scales=state.absmax,
        scale_code=state.state2.code,
        group_scales=state.state2.absmax,
        group_offsets=torch.full_like(state.state2.absmax, float(state.offset)),
        code=state.code,
        num_rows=layer.out_features,
    )


def _join_updates(modules: Sequence[Any], layers: Sequence[Any], dtype: torch.dtype) -> Update | None:
    from peft.tuners.lora import LoraLayer

    if not any(isinstance(module, LoraLayer) for module in modules):
        return None
    found = [_read_update(module) for module in modules]
    rank = pad_rank(max(factors[0].shape[0] for factors in found if factors is not None))
    num_inputs = layers[0].in_features
    rows_a, rows_b = [], []
    for factors, layer in zip(found, layers, strict=True):
        padded_a = torch.zeros(rank, num_inputs, dtype=dtype, device=layer.weight.device)
        padded_b = torch.zeros(layer.out_features, rank, dtype=dtype, device=layer.weight.device)
        if factors is not None:
            lower, upper = factors
            padded_a[: lower.shape[0]] = lower
            padded_b[:, : upper.shape[1]] = upper
        rows_a.append(padded_a)
        rows_b.append(padded_b)
    widths = tuple(layer.out_features for layer in layers)
    return Update(torch.cat(rows_a), torch.cat(rows_b), rank, widths)


def _read_update(module: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return A and the scaled B of a layer; None where it has no adapter."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return None
    [name] = module.active_adapters
    return module.lora_A[name].weight.data, module.lora_B[name].weight.data * module.scaling[name]
