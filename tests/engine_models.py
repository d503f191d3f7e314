"""Small models of the families that the engine computes, quantized, with LoRA; and their plain counterparts."""

import copy
from pathlib import Path
from typing import Any

import torch

from dsft.core.engine.install import Engine, install_engine
from dsft.core.models.attention import PER_SAMPLE, AttentionKernel
from dsft.core.models.device import Device, Precision, torch_dtype
from dsft.core.models.load import LoraSettings, attach_lora, load_quantized
from dsft.core.models.source import find_model

VOCABULARY = 160

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}}),
    "llama-with-all-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-with-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 64}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 64}),
}
"""Name of a kind, its family, and what its configuration has of its own."""


def write_model(kind: str, folder: Path, **sizes: Any) -> None:
    """Write random weights of a kind, biases and norms included, as float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, own = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | own | sizes)), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def load_pair(
    folder: Path,
    device: Device,
    precision: Precision = "fp32",
    attention: str = PER_SAMPLE,
    *,
    rank: int = 8,
    alpha: float = 24,
) -> tuple[Any, Any, Engine]:
    """Return a model as transformers and PEFT compute it, the same one as the engine does, and the engine."""
    kernel = AttentionKernel(attention, "")  # type: ignore[arg-type]
    base = load_quantized(find_model(str(folder)), device, precision, kernel)
    plain = attach_lora(base, LoraSettings(rank, alpha, 0.0, seed=0))
    with torch.no_grad():  # B starts at zero, and nothing would come through to A
        generator = torch.Generator(device="cpu").manual_seed(1)
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    other = copy.deepcopy(plain)
    engine = install_engine(other, attention, torch_dtype(precision))  # type: ignore[arg-type]
    return plain, other, engine
