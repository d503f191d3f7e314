"""A small random Llama on disk and a loader of it with LoRA."""

from pathlib import Path

import pytest
import torch

from dsft.core.models.attention import PER_SAMPLE, AttentionKernel
from dsft.core.models.device import Device
from dsft.core.models.load import LoraSettings, attach_lora, load_quantized
from dsft.core.models.source import find_model
from tests.unit.train.random_samples import VOCABULARY


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load_model(llama_dir: Path):
    def load(rank: int = 8, dropout: float = 0.0, nudge: bool = True):
        model = load_quantized(
            find_model(str(llama_dir)), Device("cpu", "CPU"), "fp32", AttentionKernel(PER_SAMPLE, "")
        )
        peft_model = attach_lora(model, LoraSettings(rank, 2 * rank, dropout, seed=1))
        if nudge:  # B starts at zero, which would make every gradient of A zero as well
            torch.manual_seed(2)
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
        return peft_model

    return load
