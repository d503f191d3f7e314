"""Sizes read from config.json, against real models of every family and against DeepSeek-Coder's published counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.core.errors import ModelError
from dsft.core.memory.model_shape import (
    BUILTIN_CONFIGS,
    FAMILIES,
    in_blocks,
    quantized_bytes,
    read_model_shape,
    unquantized_bytes,
)
from dsft.core.models.attention import PER_SAMPLE, AttentionKernel
from dsft.core.models.device import Device
from dsft.core.models.load import TRAINABLE_FAMILIES, LoraSettings, attach_lora, load_quantized
from dsft.core.models.source import find_model

# Whole multiples of the allocator's unit for every norm and bias, as in all published models, so that sums of them
# round as each of them does.
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 1280,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CASES: dict[str, dict[str, Any]] = {
    **{family: {"model_type": family} for family in sorted(FAMILIES)},
    "qwen3 with wide heads": {"model_type": "qwen3", "head_dim": 512},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "granite with biases": {"model_type": "granite", "attention_bias": True},
    "starcoder2 without biases": {"model_type": "starcoder2", "use_bias": False},
    "starcoder2, not tied": {"model_type": "starcoder2", "tie_word_embeddings": False},
    "one key head for each query head": {"model_type": "llama", "num_key_value_heads": 3},
}


def make_model(case: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = SIZES | {"head_dim": 256} | CASES[case]
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(config)


def shape_of(model: Any) -> Any:
    # What save_pretrained writes; a hub's config.json says the same things.
    return read_model_shape(json.loads(model.config.to_json_string(use_diff=False)), "m")


def test_the_families_with_arithmetic_are_those_that_train() -> None:
    assert FAMILIES == TRAINABLE_FAMILIES


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_real_model(case: str) -> None:
    model = make_model(case)
    shape = shape_of(model)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_blocks == model.config.num_hidden_layers


@pytest.mark.parametrize("case", CASES)
def test_linear_layers_are_those_of_a_real_block_in_the_order_they_run(case: str) -> None:
    model = make_model(case)
    block = model.model.layers[1]
    names = {module: name.rpartition(".")[2] for name, module in block.named_modules()}
    ran: list[Any] = []
    for module in names:
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 6]]), use_cache=False)
    shape = shape_of(model)
    real = [(names[m], m.in_features, m.out_features, m.bias is not None) for m in ran]
    written = [(x.name, x.num_inputs, x.num_outputs, x.has_bias) for x in shape.block_linears]
    assert written == real
    assert sum(x.num_weights for x in shape.block_linears) * 2 == shape.num_linear_weights


def bytes_by_part(model: Any) -> tuple[int, int, int]:
    """Return the bytes of NF4 weights, of what belongs to them, and of all other parameters; each storage once."""
    seen: set[int] = set()
    sums = [0, 0, 0]

    def count(part: int, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sums[part] += in_blocks(storage.nbytes())

    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count(0 if state is not None else 2, parameter)
        if state is not None:
            for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                count(1, tensor)
    return sums[0], sums[1], sums[2]


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_lora_weights_are_those_of_the_quantized_model(case: str, tmp_path: Path) -> None:
    original = make_model(case)
    original.save_pretrained(tmp_path)
    model = load_quantized(find_model(str(tmp_path)), Device("cpu", "CPU"), "bf16", AttentionKernel(PER_SAMPLE, ""))
    shape = read_model_shape(json.loads((tmp_path / "config.json").read_text()), "m")
    assert bytes_by_part(model) == (*quantized_bytes(shape), unquantized_bytes(shape, 2))
    for rank in (1, 8):
        trained = attach_lora(model, LoraSettings(rank, 16, 0.0, seed=1))
        assert shape.num_lora_weights(rank) == sum(p.numel() for p in trained.parameters() if p.requires_grad)
        model = trained.unload()


def test_deepseek_coder_has_its_published_sizes() -> None:
    shape = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7b")
    # 32 blocks of 4 x 4096² + 3 x 4096 x 11008 weights and 2 norms, a last norm, and 2 x 32256 x 4096.
    assert shape.num_parameters == 6_740_512_768
    assert shape.num_linear_weights == 6_476_005_376
    weights, scales = quantized_bytes(shape)
    assert weights == 3_238_002_688
    # Each of the 4 square layers: 262,144 scales, 1,024 float32 over them, codes of 1,024 and 512 (64, rounded), an
    # offset of 512 (4, rounded); each of the 3 others: 704,512 and 2,752 x 4.
    assert scales == 32 * (4 * (262_144 + 4_096 + 2_048) + 3 * (704_512 + 11_264 + 2_048))
    assert unquantized_bytes(shape, 2) == 2 * 2 * 32_256 * 4_096 + 32 * 2 * 2 * 4_096 + 2 * 4_096
    assert sum(quantized_bytes(shape)) + unquantized_bytes(shape, 2) == 3_870_269_440
    # r x (4 x 2 x 4096 + 3 x (4096 + 11008)) for each block.
    assert shape.num_lora_weights(64) == 159_907_840
    assert shape.num_lora_weights(64) == 64 * shape.num_lora_weights(1)


def test_deepseek_coder_takes_on_a_gpu_what_is_calculated() -> None:
    # torch.cuda.memory_allocated() after load_quantized of these sizes; what is more are four small tables of the
    # rotation, a unit of the allocator each.
    measured_bytes = 3_870_271_488
    shape = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7b")
    assert 0 <= measured_bytes - sum(quantized_bytes(shape)) - unquantized_bytes(shape, 2) <= 4 * 512


@pytest.mark.parametrize(("size", "billions"), [("1.3b", 1.35), ("6.7b", 6.74), ("33b", 33.34)])
def test_builtin_records_have_the_parameters_of_their_names(size: str, billions: float) -> None:
    for kind in ("base", "instruct"):
        config = BUILTIN_CONFIGS[f"deepseek-ai/deepseek-coder-{size}-{kind}"]
        assert read_model_shape(config, size).num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_builtin_record_is_the_published_config(shared: Path) -> None:
    published = json.loads((shared / "assets/deepseek-coder-6.7b/config.json").read_text())
    builtin = BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-instruct"]
    assert read_model_shape(published, "m") == read_model_shape(builtin, "m")
    assert {key: published[key] for key in builtin} == builtin


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "vocab_size": 5,
}


def test_sizes_that_a_config_leaves_out_follow_from_the_others() -> None:
    plain = read_model_shape(LLAMA, "m")
    assert (plain.head_dim, plain.num_kv_heads, plain.is_tied) == (4, 2, False)
    assert plain == read_model_shape(LLAMA | {"head_dim": None, "num_key_value_heads": None}, "m")
    wide = read_model_shape(LLAMA | {"head_dim": 16, "num_key_value_heads": 1}, "m")
    assert (wide.num_query_values, wide.num_kv_values, wide.output_linear.num_inputs) == (32, 16, 32)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -4, 2.5, "8", True])
def test_a_size_that_is_no_positive_whole_number_is_refused(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"config\.json of m: {key}"):
        read_model_shape(LLAMA | {key: value}, "m")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1001}, "num_hidden_layers is more than 1,000"),
        ({"vocab_size": 10**400}, "vocab_size is more than 10,000,000"),
        ({"hidden_size": 9}, "hidden_size 9 can't be divided among 2 heads"),
        ({"hidden_size": 9, "head_dim": None}, "hidden_size 9 can't be divided among 2 heads"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "8 is no multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 4}, "num_attention_heads 2 is no multiple of num_key_value_heads 4"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, and is 'false'"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings must be true or false, and is 0"),
    ],
)
def test_sizes_that_no_model_can_have_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_model_shape(LLAMA | changes, "m")
    assert words in caught.value.found


def test_the_largest_number_of_blocks_and_heads_of_any_size_are_taken() -> None:
    assert read_model_shape(LLAMA | {"num_hidden_layers": 1000}, "m").num_blocks == 1000
    assert read_model_shape(LLAMA | {"hidden_size": 9, "head_dim": 4}, "m").num_query_values == 8


@pytest.mark.parametrize("config", [{}, {"model_type": "mixtral"}])
def test_a_family_without_arithmetic_is_refused_with_those_that_have_it(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="family") as caught:
        read_model_shape(config, "m")
    assert "llama" in caught.value.fix


def test_allocations_are_rounded_up_to_whole_units() -> None:
    assert [in_blocks(n) for n in (0, 1, 511, 512, 513, 1024)] == [512, 512, 512, 512, 1024, 1024]
