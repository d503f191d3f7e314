"""Small models of random weights, of families that keep what they read in different ways, for tests of decoding."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 97

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,  # wide: answers depend on the whole prompt instead of repeating one token
    "tie_word_embeddings": False,
}

_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "bloom": {"n_layer": 3, "n_head": 4},  # no positions but the mask's
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "head_dim": 16, "query_pre_attn_scalar": 16},  # every other layer has the window
    "mamba": {"state_size": 8, "expand": 2},  # returns no keys and values
    "jamba": {  # takes several tokens for the beginning of a text
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "bamba": {  # does not count positions itself
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "attn_layer_indices": [1, 3],
    },
}

WITH_ROWS = ("llama", "gpt2", "bloom", "mistral", "gemma2", "jamba", "bamba")
"""Families that answer several prompts at once."""

ALL = (*WITH_ROWS, "mamba")


def make_family_model(family: str) -> nn.Module:
    """Return a model of a family, in float32 and evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SHAPE | _OWN[family]))
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


@torch.no_grad()
def read_afresh(model: nn.Module, text: list[int]) -> torch.Tensor:
    """Return the logits after each token of a text, read at once without a cache, [num_tokens, vocab_size]."""
    logits: torch.Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return logits


def answer_afresh(model: nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the likeliest tokens after a prompt, the whole text read again for each of them."""
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(read_afresh(model, text)[-1].argmax()))
    return text[len(prompt) :]
