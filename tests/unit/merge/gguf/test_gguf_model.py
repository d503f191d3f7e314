"""Which models a GGUF is written of, under which names, and which are refused before anything is written."""

from typing import Any

import gguf
import pytest
import torch

from dsft.core.errors import ModelError
from dsft.merge.gguf.model import read_gguf_model
from tests.gguf_models import SMALL_MODELS, make_model, plan_small, small_config, tiny_tokenizer, weights_of


@pytest.mark.parametrize("settings", SMALL_MODELS.values(), ids=SMALL_MODELS)
def test_tensors_are_transformers_and_names_are_ggufs(settings) -> None:
    config = small_config(**settings)
    model = read_gguf_model(config)
    state = make_model(config).state_dict()
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[model.architecture], 2)
    assert {name: tensor.gguf_name for name, tensor in model.tensors.items()} == {
        name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in state
    }


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"model_type": "phi3"}, "model family phi3"),
        ({"model_type": "starcoder2"}, "model family starcoder2"),
        ({"model_type": "no_such"}, "model family no_such"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rule 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rule 'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rule 'longrope'"),
        (SMALL_MODELS["llama3 rope"] | {"model_type": "qwen2"}, "rule 'llama3'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        ({"model_type": "mistral", "sliding_window": 256}, "sees 256 tokens back"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128}, "sees 128 tokens back"),
        ({"model_type": "qwen2", "head_dim": 32}, "don't make up the hidden size"),
        ({"model_type": "qwen3", "head_dim": 16, "attention_bias": True}, "attention_bias"),
        ({"head_dim": 15}, "Heads of 15 values"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ({"hidden_size": None}, "hidden_size must be"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError, match=found):
        read_gguf_model(small_config(**settings))


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert read_gguf_model(small_config(model_type="mistral", sliding_window=512)).context_length == 512


def test_what_the_configuration_leaves_out_is_as_transformers_has_it() -> None:
    config = small_config()
    del config["max_position_embeddings"], config["num_key_value_heads"]
    model = read_gguf_model(config)
    assert (model.context_length, model.shape.num_kv_heads, model.rope.frequency_base) == (2048, 4, 10000.0)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
            r"q_proj\.bias is a tensor that .* has no place for",
        ),
        ({"lm_head.weight": None}, r"lm_head\.weight is a tensor that .* lacks"),
        ({"model.norm.weight": None}, r"model\.norm\.weight is a tensor that .* lacks"),
        ({"model.norm.weight": torch.ones(63)}, r"model\.norm\.weight has the shape \(63,\)"),
        (
            {"model.embed_tokens.weight": torch.ones(2079, 64)},
            r"shape \(2079, 64\), and config\.json says \(2080, 64\)",
        ),
    ],
)
def test_weights_that_are_not_the_configurations_are_refused(change, found) -> None:
    config = small_config()
    weights = weights_of(make_model(config))
    weights.state = {name: tensor for name, tensor in (weights.state | change).items() if tensor is not None}
    with pytest.raises(ModelError, match=found):
        plan_small("f16", weights, config, tiny_tokenizer())


def test_frequencies_in_an_old_checkpoint_are_left_out() -> None:
    config = small_config()
    weights = weights_of(make_model(config))
    weights.state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    plan = plan_small("f16", weights, config, tiny_tokenizer())
    assert {tensor.source.name for tensor in plan.tensors} == set(read_gguf_model(config).tensors)
