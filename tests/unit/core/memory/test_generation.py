"""The memory of inference, against figures worked out by hand."""

import pytest

from dsft.core.memory.cards import H100, RTX_4090
from dsft.core.memory.generation import (
    GenerationLoad,
    GenerationMemory,
    cache_bytes,
    estimate_generation,
    prefill_bytes,
)
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, quantized_bytes, read_model_shape, unquantized_bytes

SHAPE = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7b")
GROUPED = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-33b-base"], "33b")


def terms_of(memory: GenerationMemory) -> dict[str, int]:
    return {term.name: term.num_bytes for term in memory.terms}


def test_a_token_in_the_cache_is_a_key_and_a_value_for_each_block_and_key_head() -> None:
    assert cache_bytes(SHAPE, 1) == 2 * 32 * 4096 * 2 == 524_288
    # 8 of 56 heads have keys: 2 x 62 blocks x 8 x 128 values x 2 bytes.
    assert cache_bytes(GROUPED, 1000) == 1000 * 2 * 62 * 8 * 128 * 2


def test_sixteen_bits_are_two_bytes_for_each_parameter() -> None:
    memory = estimate_generation(GenerationLoad(SHAPE, 0, 1024, is_4bit=False), RTX_4090)
    terms = terms_of(memory)
    assert terms["weights"] == 2 * 6_740_512_768
    assert terms["KV cache"] == 512 * 1024**2
    assert "adapter" not in terms


def test_four_bits_are_the_weights_of_training_and_the_adapter_is_float32() -> None:
    terms = terms_of(estimate_generation(GenerationLoad(SHAPE, 64, 1024, is_4bit=True), RTX_4090))
    assert (terms["NF4 weights"], terms["scales of the weights"]) == quantized_bytes(SHAPE)
    assert terms["embedding, head, norms"] == unquantized_bytes(SHAPE, 2)
    assert terms["adapter"] == 4 * 159_907_840


def test_the_prompt_s_pass_is_the_last_layer_of_the_mlp() -> None:
    inputs, outputs, tokens = 11008, 4096, 1000
    plain = 2 * tokens * (4096 + inputs + outputs)
    assert prefill_bytes(GenerationLoad(SHAPE, 0, tokens, is_4bit=False)) == pytest.approx(plain, abs=512)
    adapted = plain + 4 * tokens * (inputs + outputs)
    assert prefill_bytes(GenerationLoad(SHAPE, 8, tokens, is_4bit=False)) == pytest.approx(adapted, abs=512)
    packed = adapted + 2 * inputs * outputs
    assert prefill_bytes(GenerationLoad(SHAPE, 8, tokens, is_4bit=True)) == pytest.approx(packed, abs=512)


@pytest.mark.parametrize("is_4bit", [True, False])
@pytest.mark.parametrize("card", [RTX_4090, H100])
def test_terms_add_up_to_the_process(is_4bit: bool, card: object) -> None:
    memory = estimate_generation(GenerationLoad(SHAPE, 32, 777, is_4bit), card)  # type: ignore[arg-type]
    assert sum(term.num_bytes for term in memory.terms) == memory.process_bytes
    overhead = terms_of(memory)["idle in the allocator"] + terms_of(memory)["CUDA context and kernels"]
    assert memory.process_bytes - overhead == memory.allocated_bytes


def test_a_measured_context_takes_the_record_s_place() -> None:
    load = GenerationLoad(SHAPE, 0, 64, is_4bit=False)
    recorded = estimate_generation(load, RTX_4090)
    measured = estimate_generation(load, RTX_4090, context_bytes=RTX_4090.context_bytes + 12345)
    assert measured.process_bytes == recorded.process_bytes + 12345
