"""Small base models and adapters that `dsft merge` is tested with, and what a merge must give of them.

The reference weights are computed here in float64, from the formulas and PEFT's live modules: nothing of dsft is in it.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from tests.merge_kinds import Family
from tests.scripted_models import make_tokenizer


def write_base(
    folder: Path, family: Family = "llama", *, is_tied: bool = False, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> Path:
    """Write a base model of random weights with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokens = {"vocab_size": size, "bos_token_id": size - 3, "eos_token_id": size - 2, "initializer_range": 0.1}
    model: PreTrainedModel
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**(tokens | {"n_embd": 64, "n_layer": 2, "n_head": 4} | config)))
    else:
        shape = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": is_tied,
        }
        settings = tokens | shape | config
        # Qwen2's checkpoints have more rows than tokens, as the real ones do.
        more = {"vocab_size": size + 4} if family == "qwen2" else {}
        model = (
            Qwen2ForCausalLM(Qwen2Config(**(settings | more)))
            if family == "qwen2"
            else LlamaForCausalLM(LlamaConfig(**settings))
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases of zero and norms of one would hide what is left out
                parameter.add_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.1))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lora(
    folder: Path, base: Path, settings: dict[str, Any], *, num_new_tokens: int = 0, size: float = 0.1
) -> PeftModel:
    """Write an adapter as it is after training, with its tokenizer, and return base and adapter unmerged in float32.

    Args:
        folder: Where it goes.
        base: Folder of its base model.
        settings: As PEFT's LoraConfig takes them; rank 4 and alpha 8 if not given.
        num_new_tokens: Tokens added to the vocabulary before training.
        size: Standard deviation of the factors; 0.1 makes an update that is a third of the weights.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(3)
    if num_new_tokens:
        tokenizer.add_tokens([f"<new{number}>" for number in range(num_new_tokens)])
        model.resize_token_embeddings(len(tokenizer) + 5, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8} | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights and of resized embeddings
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    _train(name, parameter, size)
        adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return adapted.eval()


def _train(name: str, parameter: nn.Parameter, size: float) -> None:
    change = torch.randn_like(parameter)
    if "magnitude" in name:
        parameter.mul_(1 + change / 10)
    elif "lora_" in name:
        parameter.copy_(change * size)
    else:
        parameter.add_(change * 0.05)


def make_ids(model: nn.Module) -> Tensor:
    """Return prompts that use tokens of the whole vocabulary."""
    num_tokens = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(1))[:256].view(4, 64)


@torch.no_grad()
def run_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a model's logits."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


@torch.no_grad()
def compute_reference(adapted: PeftModel) -> dict[str, Tensor]:
    """Return the weights that one model needs to compute what base and adapter do, in float64, by their base names."""
    weights: dict[str, Tensor] = {}
    _collect("", adapted.base_model.model, weights)
    return weights


def _collect(path: str, module: nn.Module, weights: dict[str, Tensor]) -> None:
    if isinstance(module, ModulesToSaveWrapper):
        _collect(path, module.modules_to_save["default"], weights)
    elif isinstance(module, TrainableTokensWrapper):
        weight = module.original_module.weight.double().clone()
        adapter = module.token_adapter
        weight[adapter.token_indices["default"]] = adapter.trainable_tokens_delta["default"].double()
        weights[f"{path}.weight"] = weight
    elif isinstance(module, LoraLayer):
        _collect(path, module.get_base_layer(), weights)
        weights[f"{path}.weight"] = _add_update(weights[f"{path}.weight"], module)
        if module.lora_bias["default"]:
            weights[f"{path}.bias"] += _scaling(module) * module.lora_B["default"].bias.double()
    else:
        for name, parameter in module.named_parameters(recurse=False):
            weights[f"{path}.{name}"] = parameter.double().clone()
        for name, child in module.named_children():
            _collect(f"{path}.{name}" if path else name, child, weights)


def _add_update(stored: Tensor, module: LoraLayer) -> Tensor:
    """Return a weight with its update: W + s·B·A, and with DoRA m·(W + s·B·A) / ‖W + s·B·A‖ for each output."""
    is_embedding = isinstance(module.get_base_layer(), nn.Embedding)
    if is_embedding:
        a, b = module.lora_embedding_A["default"].double(), module.lora_embedding_B["default"].double()
    else:
        a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
    is_transposed = is_embedding or isinstance(module.get_base_layer(), Conv1D)
    weight = (stored.T if is_transposed else stored) + _scaling(module) * (b @ a)
    if "default" in module.lora_magnitude_vector:
        magnitudes = module.lora_magnitude_vector["default"].weight.double().flatten()
        weight = weight * (magnitudes / weight.norm(dim=1)).unsqueeze(1)
    return weight.T if is_transposed else weight


def _scaling(module: LoraLayer) -> float:
    rank, alpha = module.r["default"], module.lora_alpha["default"]
    return float(alpha / rank**0.5 if module.use_rslora["default"] else alpha / rank)


def round_exactly(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round float64 numbers to a type of 16 bits, to nearest and ties to even, without a step in float32 between.

    Returns:
        The rounded numbers and the distance of neighbours there, both in float64.
    """
    digits, least = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}[dtype]
    exponents = torch.frexp(numbers).exponent - digits
    steps = torch.ldexp(torch.ones_like(numbers), exponents.clamp(min=least))
    return torch.round(numbers / steps) * steps, steps
