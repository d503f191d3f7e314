"""Putting the engine into one loaded model: its blocks take the places of transformers' own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsft.core.engine.block import EngineBlock, EngineNorm
from dsft.core.engine.flat_lora import FlatLora
from dsft.core.engine.halves import AttentionHalf, MlpHalf, Norm
from dsft.core.engine.nf4_weight import Nf4Weight, join
from dsft.core.engine.projection import Projection, Workspace
from dsft.core.errors import ModelError
from dsft.core.models.attention import AttentionName

_ADAPTER = "default"
_GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


@dataclass(frozen=True)
class Engine:
    """The engine in a model.

    Attributes:
        lora: LoRA's weights and gradients.
        blocks: In order.
        decoder: The model's decoder.
        layers: Its own layers, in whose places the blocks are.
        norm: Its own last norm.
    """

    lora: FlatLora
    blocks: Sequence[EngineBlock]
    decoder: Any
    layers: Sequence[Any]
    norm: Any

    @property
    def fuses_loss(self) -> bool:
        """Whether the engine's kernel computes the loss: it does."""
        return True

    def recompute(self, num_blocks: int) -> None:
        """Let the first `num_blocks` blocks run forward once more in the backward pass (arXiv:1604.06174).

        The first ones, because they come last in the backward pass: what the others keep is freed by then.
        """
        for index, block in enumerate(self.blocks):
            block.recomputes = index < num_blocks

    def remove(self) -> None:
        """Give the model its own modules back."""
        for index, layer in enumerate(self.layers):
            self.decoder.layers[index] = layer
        self.decoder.norm = self.norm


def install_engine(model: Any, attention: AttentionName, compute_dtype: torch.dtype) -> Engine:
    """Let the engine compute a model's blocks.

    Args:
        model: A PEFT model from `attach_lora`, of a family in `engine_families.ENGINE_FAMILIES`.
        attention: The attention kernel.
        compute_dtype: Type of the matrix products.

    Raises:
        ModelError: A layer is not what `support.find_obstacle` took it to be.
    """
    decoder = model.get_base_model().model
    runs = [run for layer in decoder.layers for group in _GROUPS for run in _lora_runs(_find_layers(layer, group))]
    lora = FlatLora(runs, compute_dtype)
    if {id(part) for part in lora.parts} != {id(p) for p in model.parameters() if p.requires_grad}:
        raise ModelError("The model trains weights that the engine does not know.", "Take --engine off.")
    workspace = Workspace(0, compute_dtype, decoder.norm.weight.device)
    blocks = [_make_block(layer, decoder.config, attention, lora, workspace) for layer in decoder.layers]
    projections = [part for block in blocks for part in _projections(block)]
    shared = Workspace(max(part.workspace_values() for part in projections), compute_dtype, lora.gradients.device)
    for part in projections:
        part.set_workspace(shared)
    engine = Engine(lora, blocks, decoder, list(decoder.layers), decoder.norm)
    for index, block in enumerate(blocks):
        decoder.layers[index] = block
    decoder.norm = EngineNorm(decoder.norm)
    return engine


def _projections(block: EngineBlock) -> list[Projection]:
    return [block.attention.inputs, block.attention.output, block.mlp_half.inputs, block.mlp_half.output]


def _find_layers(layer: Any, group: tuple[str, tuple[str, ...]]) -> list[Any]:
    parent, names = group
    return [getattr(getattr(layer, parent), name) for name in names]


def _lora_runs(layers: Sequence[Any]) -> list[list[torch.nn.Parameter]]:
    return [[getattr(layer, part)[_ADAPTER].weight for layer in layers] for part in ("lora_A", "lora_B")]


def _make_block(layer: Any, config: Any, attention: AttentionName, lora: FlatLora, workspace: Workspace) -> EngineBlock:
    groups = [_find_layers(layer, group) for group in _GROUPS]
    try:
        weights = join([[adapted.base_layer for adapted in group] for group in groups])
    except ValueError as error:
        raise ModelError(f"The engine can't read a linear layer: {error}.", "Take --engine off.") from error
    attention_in, attention_out, mlp_in, mlp_out = (
        _make_projection(group, own, lora, workspace) for group, own in zip(groups, weights, strict=True)
    )
    own = layer.self_attn
    head_norms = (_take_norm(own.q_norm), _take_norm(own.k_norm)) if hasattr(own, "q_norm") else None
    return EngineBlock(
        layer,
        AttentionHalf(
            norm=_take_norm(layer.input_layernorm),
            inputs=attention_in,
            output=attention_out,
            head_norms=head_norms,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=own.head_dim,
            scaling=own.scaling,
            kernel=attention,
        ),
        MlpHalf(norm=_take_norm(layer.post_attention_layernorm), inputs=mlp_in, output=mlp_out),
    )


def _take_norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon)


def _make_projection(
    layers: Sequence[Any], weights: Sequence[Nf4Weight], lora: FlatLora, workspace: Workspace
) -> Projection:
    bases = [layer.base_layer for layer in layers]
    factors_a, factors_b = (lora.matrix(run) for run in _lora_runs(layers))
    bias = None
    if any(base.bias is not None for base in bases):
        biases = [lora.copy.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
        bias = torch.cat(biases).to(lora.copy.dtype)
    num_outputs = [base.out_features for base in bases]
    return Projection(weights, num_outputs, factors_a, factors_b, layers[0].scaling[_ADAPTER], bias, workspace)
