"""The memory of inference, against figures worked out by hand."""

from dataclasses import replace

import pytest

from dsft.core.memory.cards import H100, RTX_4090, find_card
from dsft.core.memory.generation import (
    GenerationLoad,
    GenerationMemory,
    cache_bytes,
    capacity_for,
    estimate_generation,
    factor_bytes,
    has_decoder,
    joined_bytes,
    plain_pass_bytes,
)
from dsft.core.memory.model_shape import (
    BUILTIN_CONFIGS,
    ModelShape,
    quantized_bytes,
    read_model_shape,
    unquantized_bytes,
)
from dsft.core.memory.prompt_pass import prompt_bytes

SHAPE = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7b")
GROUPED = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-33b-base"], "33b")
OTHER = read_model_shape(
    BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"] | {"model_type": "granite"}, "another family"
)
MIB = 1024**2


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
    assert not {"adapter", "adapter's factors", "joined scales and biases"} & terms.keys()


def test_four_bits_are_the_weights_of_training_and_the_adapter_is_float32() -> None:
    terms = terms_of(estimate_generation(GenerationLoad(SHAPE, 64, 1024, is_4bit=True), RTX_4090))
    assert (terms["NF4 weights"], terms["scales of the weights"]) == quantized_bytes(SHAPE)
    assert terms["embedding, head, norms"] == unquantized_bytes(SHAPE, 2)
    assert terms["adapter"] == 4 * 159_907_840
    assert terms["adapter's factors"] == 2 * 159_907_840
    assert terms["prompt's pass"] == prompt_bytes(SHAPE, 64, 1024, is_4bit=True)


def test_the_decoder_s_cache_has_room_for_one_more_in_whole_steps() -> None:
    assert [capacity_for(count) for count in (1, 511, 512, 1100, 4060, 8060)] == [512, 512, 1024, 1536, 4096, 8192]
    terms = terms_of(estimate_generation(GenerationLoad(SHAPE, 0, 1024, is_4bit=False), RTX_4090))
    assert terms["KV cache"] == 768 * MIB
    assert terms["cosines and sines"] == 2 * 1536 * 128 * 2


def test_factors_have_a_padded_rank() -> None:
    assert factor_bytes(SHAPE, 0) == 0
    assert factor_bytes(SHAPE, 8) == factor_bytes(SHAPE, 16) == 2 * SHAPE.num_lora_weights(16)
    assert factor_bytes(SHAPE, 48) == 2 * SHAPE.num_lora_weights(64)


def test_offsets_are_made_for_each_group_of_scales_and_joined_layers_copy_their_own_scale() -> None:
    square, wide = 4096 * 4096 // 64 // 256 * 4, 4096 * 11008 // 64 // 256 * 4
    # Queries, keys, values and gate, up are joined: offsets and scales; the two others have offsets alone.
    joined, alone = 2 * (3 * square + 2 * wide), square + 11264
    assert joined_bytes(SHAPE, is_4bit=True) == 32 * (joined + alone)
    assert joined_bytes(SHAPE, is_4bit=False) == 0


def test_layers_whose_groups_of_scales_reach_over_have_offsets_alone() -> None:
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = read_model_shape(config | {"model_type": "llama", "vocab_size": 100}, "small")
    assert joined_bytes(shape, is_4bit=True) == 7 * 512


def test_biases_of_joined_layers_are_made_anew() -> None:
    shape = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"] | {"model_type": "qwen2"}, "qwen2")
    assert joined_bytes(shape, is_4bit=False) == 32 * 2 * 3 * 4096


def test_other_families_and_older_cards_take_transformers_modules() -> None:
    assert has_decoder(SHAPE, RTX_4090)
    assert has_decoder(GROUPED, find_card("A100 80GB"))
    assert not has_decoder(SHAPE, find_card("T4"))
    for other in (OTHER, replace(SHAPE, head_dim=96), replace(SHAPE, intermediate_size=11000)):
        assert not has_decoder(other, RTX_4090)
    load = GenerationLoad(OTHER, 64, 1000, is_4bit=True)
    terms = terms_of(estimate_generation(load, RTX_4090))
    assert "adapter's factors" not in terms
    assert terms["KV cache"] == cache_bytes(OTHER, 1000)
    assert terms["prompt's pass"] == plain_pass_bytes(load)
    assert terms["adapter"] == 4 * 159_907_840


@pytest.mark.parametrize(("shape", "path"), [(SHAPE, "dsft's decoder"), (OTHER, "transformers' modules")])
def test_terms_say_whose_pass_it_is(shape: ModelShape, path: str) -> None:
    memory = estimate_generation(GenerationLoad(shape, 0, 5000, is_4bit=True), H100)
    [term] = [term for term in memory.terms if term.name == "prompt's pass"]
    assert path in term.formula


def test_a_longer_text_a_higher_rank_and_more_bits_never_take_less() -> None:
    def take(rank: int, num_tokens: int, *, is_4bit: bool) -> int:
        return estimate_generation(GenerationLoad(GROUPED, rank, num_tokens, is_4bit), RTX_4090).allocated_bytes

    lengths = [take(8, count, is_4bit=True) for count in (1, 64, 65, 500, 512, 4095, 4096, 4097, 8192, 16_384)]
    ranks = [take(rank, 1000, is_4bit=True) for rank in (0, 1, 8, 16, 17, 64)]
    assert lengths == sorted(lengths)
    assert ranks == sorted(ranks)
    assert take(8, 1000, is_4bit=True) < take(8, 1000, is_4bit=False)


def test_the_pass_of_transformers_modules_is_the_last_layer_of_the_mlp() -> None:
    inputs, outputs, tokens = 11008, 4096, 1000
    plain = 2 * tokens * (4096 + inputs + outputs)
    assert plain_pass_bytes(GenerationLoad(SHAPE, 0, tokens, is_4bit=False)) == pytest.approx(plain, abs=512)
    adapted = plain + 4 * tokens * (inputs + outputs)
    assert plain_pass_bytes(GenerationLoad(SHAPE, 8, tokens, is_4bit=False)) == pytest.approx(adapted, abs=512)
    packed = adapted + 2 * inputs * outputs
    assert plain_pass_bytes(GenerationLoad(SHAPE, 8, tokens, is_4bit=True)) == pytest.approx(packed, abs=512)


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
