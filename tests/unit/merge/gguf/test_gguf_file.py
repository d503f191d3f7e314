"""GGUF files read back with the gguf package into the original configuration: weights, keys and logits."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dsft.core.errors import DsftError
from dsft.merge.gguf.file import write_gguf
from dsft.merge.gguf.plan import GgufPlan
from tests.gguf_models import (
    SMALL_MODELS,
    StateDictWeights,
    load_state,
    logits_of,
    make_model,
    plan_small,
    read_fields,
    read_state,
    small_config,
    tiny_tokenizer,
    weights_of,
    write_small,
)

IDS = [(7 * place) % 2000 for place in range(200)]


def as_q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Return weights rounded to q8_0 and back: int8 times a float16 scale for 32 weights, halves away from zero."""
    blocks = weight.reshape(-1, 32).numpy()
    # NumPy divides float32 as ggml does; everything after is exact in float64.
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    scaled = (blocks * inverse).astype(np.float64)
    steps = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
    return torch.from_numpy((steps * scales.astype(np.float16)).astype(np.float32)).reshape(weight.shape)


def rounded(name: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
    if weight.ndim == 1:
        return weight
    return weight.half().float() if kind == "f16" or weight.shape[1] % 32 else as_q8_0(weight)


@pytest.fixture(params=SMALL_MODELS)
def config(request: pytest.FixtureRequest) -> dict[str, object]:
    return small_config(**SMALL_MODELS[request.param])


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_read_back_it_is_the_model_rounded_once(tmp_path: Path, config, kind) -> None:
    model = make_model(config)
    state = read_state(write_small(tmp_path / "m.gguf", kind, model, config), config)
    for name, weight in weights_of(model).state.items():
        assert torch.equal(state[name], rounded(name, weight, kind)), name

    expected = load_state(
        config, {name: rounded(name, tensor, kind) for name, tensor in weights_of(model).state.items()}
    )
    logits, original = logits_of(load_state(config, state), IDS), logits_of(model, IDS)
    assert torch.equal(logits, logits_of(expected, IDS))
    # Against the weights before they were rounded: float16 keeps 11 bits, q8_0 about 8.
    off = (logits - original).abs().mean() / original.std()
    assert 0 < off < (0.002 if kind == "f16" else 0.05)


def test_each_weight_of_q8_0_is_within_half_a_step(tmp_path: Path) -> None:
    config = small_config()
    model = make_model(config)
    state = read_state(write_small(tmp_path / "m.gguf", "q8_0", model, config), config)
    for name, weight in weights_of(model).state.items():
        if weight.ndim == 2:
            step = weight.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            # Half a step, and what rounding the step to float16 moves 127 of them by.
            most = step * (0.5 + 127 / 2048)
            off = (state[name] - weight).abs().reshape(-1, 32)
            assert (off <= most).all() and (off > 0.4 * step).any(), name


def test_the_embedded_models_file_holds_its_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from dsft.core.models.source import find_model

    source = find_model("builtin:tiny/model")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32)
    path = write_small(tmp_path / "m.gguf", "f16", model, source.model_config)
    state = read_state(path, source.model_config)
    assert "lm_head.weight" not in state
    # Published in bfloat16; all of it fits float16 but for the smallest values.
    ids = tiny_tokenizer()("def times_four(n):\n    return")["input_ids"]
    assert (logits_of(load_state(source.model_config, state), ids) - logits_of(model, ids)).abs().max() < 1e-3


def test_keys_are_those_of_the_configuration(tmp_path: Path) -> None:
    config = small_config(**SMALL_MODELS["linear rope"], num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    fields = read_fields(write_small(tmp_path / "m.gguf", "q8_0", make_model(config), config))
    assert {key: value for key, value in fields.items() if not key.startswith(("tokenizer.", "GGUF."))} == {
        "general.architecture": "llama",
        "general.name": "small",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": 2080,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6, rel=1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }


def test_linear_scaling_reads_the_same_in_both_forms_of_the_configuration(tmp_path: Path) -> None:
    newer = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000}}
    found = []
    for settings in (SMALL_MODELS["linear rope"], newer):
        config = small_config(**settings)
        fields = read_fields(write_small(tmp_path / "m.gguf", "f16", make_model(config), config))
        found.append({key: value for key, value in fields.items() if ".rope." in key})
    assert found[0] == found[1] and found[0]["llama.rope.scaling.factor"] == 4.0


def test_without_scaling_no_key_of_it_is_written(tmp_path: Path) -> None:
    config = small_config()
    fields = read_fields(write_small(tmp_path / "m.gguf", "f16", make_model(config), config))
    assert fields["llama.rope.freq_base"] == 10000.0
    assert not [key for key in fields if "rope.scaling" in key]
    assert "llama.attention.key_length" not in fields


def test_divisors_of_llama3_make_transformers_frequencies(tmp_path: Path) -> None:
    config = small_config(**SMALL_MODELS["llama3 rope"], head_dim=64)
    model = make_model(config)
    reader = gguf.GGUFReader(write_small(tmp_path / "m.gguf", "f16", model, config))
    divisors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    np.testing.assert_allclose(plain / divisors, expected.numpy(), rtol=1e-5)
    assert divisors.min() == 1 and divisors.max() == 8 and ((divisors > 1) & (divisors < 8)).any()


def test_a_tied_head_is_not_written_and_a_head_of_its_own_is(tmp_path: Path) -> None:
    for is_tied in (True, False):
        config = small_config(tie_word_embeddings=is_tied)
        reader = gguf.GGUFReader(write_small(tmp_path / "m.gguf", "f16", make_model(config), config))
        assert ("output.weight" in {tensor.name for tensor in reader.tensors}) is not is_tied


def test_rows_of_no_whole_blocks_go_as_f16_and_that_is_told(tmp_path: Path) -> None:
    config = small_config(intermediate_size=100)
    model = make_model(config)
    plan = plan_small("q8_0", weights_of(model), config, tiny_tokenizer())
    assert [notice for notice in plan.notices if "2 matrices (blk.0.ffn_down.weight first)" in notice]
    path = write_small(tmp_path / "m.gguf", "q8_0", model, config)
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.1.ffn_down.weight"] == gguf.GGMLQuantizationType.F16
    assert types["blk.1.ffn_up.weight"] == gguf.GGMLQuantizationType.Q8_0
    assert types["blk.1.ffn_norm.weight"] == gguf.GGMLQuantizationType.F32
    assert not plan_small("f16", weights_of(model), config, tiny_tokenizer()).notices
    state = read_state(path, config)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(state[name], weights_of(model).state[name].half().float())


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("num_rows", [1, 5, 64, 10_000])
def test_size_and_progress_are_known_before(tmp_path: Path, kind, num_rows) -> None:
    config = small_config(**SMALL_MODELS["llama3 rope"])
    weights = weights_of(make_model(config))
    weights.num_rows = num_rows
    plan = plan_small(kind, weights, config, tiny_tokenizer(), chat_template="{{ messages }}" * 999)
    told: list[int] = []
    path = tmp_path / "m.gguf"
    write_gguf(path, plan, weights, told.append)
    assert sum(told) == plan.weight_bytes == sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    assert path.stat().st_size <= plan.most_file_bytes < path.stat().st_size + 128 * 1024
    assert weights.told == [tensor.name for tensor in weights.tensors]
    # The file does not depend on how its rows came.
    assert all(
        torch.equal(found, rounded(name, weights.state[name], kind)) for name, found in read_state(path, config).items()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight"])
def test_a_weight_that_does_not_fit_is_refused_by_its_tensors_name(tmp_path: Path, value, kind, name) -> None:
    config = small_config()
    weights = weights_of(make_model(config))
    weights.state[name] = weights.state[name].clone()
    weights.state[name][50, 3] = value
    plan = plan_small(kind, weights, config, tiny_tokenizer())
    gguf_name = {"lm_head.weight": "output.weight"}.get(name, "blk.1.attn_q.weight")
    with pytest.raises(DsftError, match=f"{gguf_name} holds a weight that is NaN, infinite or too large for {kind}"):
        write_gguf(tmp_path / "m.gguf", plan, weights, lambda _: None)


def test_a_norm_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    config = small_config()
    weights = weights_of(make_model(config))
    weights.state["model.norm.weight"] = torch.full((64,), float("inf"))
    with pytest.raises(DsftError, match=r"output_norm\.weight holds"):
        write_gguf(tmp_path / "m.gguf", plan_small("f16", weights, config, tiny_tokenizer()), weights, lambda _: None)


def test_a_tensor_that_comes_short_is_refused(tmp_path: Path) -> None:
    config = small_config()
    weights = weights_of(make_model(config))
    plan: GgufPlan = plan_small("f16", weights, config, tiny_tokenizer())
    short = StateDictWeights(weights.state | {"model.embed_tokens.weight": torch.zeros(2079, 64)})
    with pytest.raises(DsftError, match=r"token_embd\.weight came with"):
        write_gguf(tmp_path / "m.gguf", plan, short, lambda _: None)
