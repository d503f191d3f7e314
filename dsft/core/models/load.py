"""Loading a base model for QLoRA: 4-bit weights, frozen, with LoRA attached. Generation loads elsewhere."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dsft.core.errors import ModelError, is_out_of_memory, take_first_line
from dsft.core.models.attention import AttentionKernel, register_attention
from dsft.core.models.device import Device, Precision, torch_dtype
from dsft.core.models.nf4_model import load_nf4_model
from dsft.core.models.source import ModelSource
from dsft.core.notices import Notify

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAINABLE_FAMILIES = frozenset(
    {"granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"}
)
"""`model_type`s whose attention is plain causal attention, which is what the padding-free kernels compute."""


@dataclass(frozen=True)
class LoraSettings:
    """Which low-rank update is trained (LoRA, arXiv:2106.09685).

    Attributes:
        rank: Rank r of the update B·A.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on the input of A.
        seed: Seed of A's random start; B starts at zero.
    """

    rank: int
    alpha: float
    dropout: float
    seed: int


def check_trainable(source: ModelSource, max_length: int) -> None:
    """Refuse, from its config.json alone, a model that dsft can't train exactly.

    Raises:
        ModelError: Unknown family, values of a wrong type, quantized checkpoint, sequences beyond the model's positions
            or window, or so long that samples would change each other's rotation.
    """
    config = source.model_config
    family = config["model_type"]
    if not isinstance(family, str):
        raise ModelError(
            f"config.json of {source.name}: model_type must be text, and is {family!r}.", "Copy the model again."
        )
    if family not in TRAINABLE_FAMILIES:
        raise ModelError(
            f"{source.name} is of the family {family}, which dsft does not train.",
            f"Families it trains: {', '.join(sorted(TRAINABLE_FAMILIES))}.",
        )
    if "quantization_config" in config:
        raise ModelError(
            f"{source.name} is quantized already, and QLoRA starts from the 16-bit weights.",
            "Give the original model; dsft quantizes it while loading.",
        )
    max_positions = config.get("max_position_embeddings")
    if isinstance(max_positions, int) and max_length > max_positions:
        raise ModelError(
            f"max_length: {max_length} is more than the {max_positions} positions of {source.name}.",
            f"Take --max-length {max_positions} or less.",
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(
            f"config.json of {source.name}: rope_parameters or rope_scaling must be an object, and is {rope!r}.",
            "Copy the model again.",
        )
    if rope.get("rope_type", rope.get("type")) == "longrope":
        # The longest sample of a micro-batch chooses the factors for all of it.
        original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        if isinstance(original, int) and max_length > original:
            raise ModelError(
                f"max_length: beyond {original} tokens {source.name} rotates all samples of a batch otherwise than "
                "each alone.",
                f"Take --max-length {original} or less.",
            )
    window = config.get("sliding_window")
    if isinstance(window, int) and config.get("use_sliding_window", True) and max_length > window:
        raise ModelError(
            f"max_length: {max_length} is more than the attention window of {window} tokens of {source.name}.",
            f"Take --max-length {window} or less.",
        )


def load_quantized(
    source: ModelSource,
    device: Device,
    precision: Precision,
    attention: AttentionKernel,
    on_notice: Notify = lambda _: None,
) -> "PreTrainedModel":
    """Load a base model with its linear layers in NF4 with double quantization (QLoRA, arXiv:2305.14314, section 3).

    Embeddings, norms and the output head keep the compute type: turning them into float32 would cost 1 GiB on the
    6.7B model and changes nothing that is trained.

    Args:
        source: The model.
        device: Where it goes; weights are quantized there, one shard at a time.
        precision: Compute type of the matrix products.
        attention: The attention kernel.
        on_notice: Receives what became of the quantized copy.

    Returns:
        The model, all parameters frozen, in evaluation mode.

    Raises:
        ModelError: The weights are missing, damaged or can't be quantized.
    """
    from safetensors import SafetensorError

    register_attention()
    options = {
        "attn_implementation": attention.name,
        "attention_dropout": 0.0,  # the variable-length kernel has none, and the kernel must not change the result
        "use_safetensors": True,
    }
    try:
        model = load_nf4_model(source, device, torch_dtype(precision), options, on_notice)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"The weights of {source.name} can't be loaded: {take_first_line(error)}",
            "The folder needs complete safetensors files; copy or download the model again.",
        ) from error
    model.requires_grad_(False)
    _keep_layer_norms_in_compute_type(model)
    keep_weights_trainable_through(model)
    return model


def _keep_layer_norms_in_compute_type(model: "PreTrainedModel") -> None:
    """Run LayerNorms (Starcoder 2's) outside autocast, which computes them in float32 and leaves their results so.

    What follows would then be float32 too, 4-bit layers included, and flash kernels take 16-bit types only. The kernel
    itself sums in float32 whatever its inputs are.
    """
    import torch

    def forward(module: torch.nn.LayerNorm, states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return torch.nn.functional.layer_norm(
                states, module.normalized_shape, module.weight, module.bias, module.eps
            )

    for module in model.modules():
        if type(module) is torch.nn.LayerNorm:
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def keep_weights_trainable_through(model: "torch.nn.Module") -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Its first forward pass in evaluation mode turns the weights into a layout for inference; the backward pass after
    that silently loses the gradient of the layer's input (bitsandbytes 0.50).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def attach_lora(model: "PreTrainedModel", settings: LoraSettings) -> "PeftModel":
    """Attach LoRA to all linear layers of each block.

    LoRA weights are float32 whatever the compute type, so that small updates are not lost to rounding.

    Args:
        model: A model from `load_quantized`.
        settings: Rank, alpha, dropout, seed.

    Returns:
        The PEFT model; its only trainable parameters are LoRA's.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import set_seed

    set_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        target_modules=_block_linear_names(model),
    )
    return get_peft_model(model, config)


def recompute_blocks(model: "PeftModel", num_blocks: int) -> None:
    """Let the first `num_blocks` blocks recompute their activations in the backward pass (arXiv:1604.06174).

    The first ones, because they come last in the backward pass: what the others keep is freed by then, and makes room
    for what these compute again. Calling it again changes the choice.
    """
    from torch.utils.checkpoint import checkpoint

    for index, block in enumerate(_blocks(model)):
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        block.gradient_checkpointing = index < num_blocks


def _blocks(model: "PeftModel") -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _block_linear_names(model: "PreTrainedModel") -> list[str]:
    from bitsandbytes.nn import Linear4bit

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if not names:
        raise ModelError(
            f"No linear layer of {model.config.name_or_path} was quantized.", "Report this with the model's name."
        )
    return sorted(names)
