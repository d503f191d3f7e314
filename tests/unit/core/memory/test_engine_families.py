"""Which models the engine takes, from their config.json alone."""

from typing import Any

import pytest

from dsft.core.memory.engine_families import ENGINE_FAMILIES, find_model_obstacle

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("family", sorted(ENGINE_FAMILIES))
def test_its_families(family: str) -> None:
    assert find_model_obstacle(CONFIG | {"model_type": family}, lora_dropout=0.0, is_gpu=True) is None


@pytest.mark.parametrize(
    ("change", "dropout", "reason"),
    [
        ({"model_type": "granite"}, 0.0, "the family granite"),
        ({}, 0.1, "no dropout in LoRA"),
        ({"hidden_act": "gelu"}, 0.0, "gelu, not silu"),
        ({"partial_rotary_factor": 0.5}, 0.0, "a part of each head"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, 0.0, "a part of each head"),
        ({"head_dim": 96}, 0.0, "not 96"),
        ({"intermediate_size": 200}, 0.0, "multiples of 64 values, not 200"),
        ({"hidden_size": 96, "head_dim": 32}, 0.0, "multiples of 64 values, not 96"),
        ({"num_attention_heads": 3, "head_dim": 32}, 0.0, "multiples of 64 values, not 96"),
    ],
)
def test_what_it_does_not_compute(change: dict[str, Any], dropout: float, reason: str) -> None:
    found = find_model_obstacle(CONFIG | change, lora_dropout=dropout, is_gpu=True)
    assert found is not None and reason in found


def test_heads_of_any_size_on_a_cpu() -> None:
    config = CONFIG | {"head_dim": 48}
    assert find_model_obstacle(config, lora_dropout=0.0, is_gpu=False) is None
    assert find_model_obstacle(config, lora_dropout=0.0, is_gpu=True) is not None
