"""The memory of a training run: each term by hand, their sum, and how it moves with the settings."""

import itertools
from dataclasses import replace

import pytest

from dsft.core.memory.cards import CARDS, H100, RTX_4090, card_of_memory
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, ModelShape, read_model_shape
from dsft.core.memory.plain_path import PassSize, block_forward, loss_and_head, recomputed_backward
from dsft.core.memory.training import (
    Group,
    TrainingLoad,
    TrainingMemory,
    estimate_training,
    lora_bytes,
    optimizer_state_bytes,
    paged_tensor_bytes,
)

MIB = 1024**2
CONFIGS = {size: BUILTIN_CONFIGS[f"deepseek-ai/deepseek-coder-{size}-base"] for size in ("1.3b", "6.7b", "33b")}
SHAPES = {name: read_model_shape(config, name) for name, config in CONFIGS.items()} | {
    "grouped": read_model_shape(CONFIGS["6.7b"] | {"num_key_value_heads": 8, "intermediate_size": 14_336}, "grouped")
}
LARGE = SHAPES["6.7b"]
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def load(shape: ModelShape = LARGE, rank: int = 64, num_tokens: int = 1024, **settings: object) -> TrainingLoad:
    return TrainingLoad(shape, rank, num_tokens, **{"num_targets": num_tokens} | settings)  # type: ignore[arg-type]


def terms_of(memory: TrainingMemory) -> dict[str, int]:
    return {term.name: term.num_bytes for term in memory.terms}


# Each term by hand


def test_what_is_there_all_the_time() -> None:
    terms = terms_of(estimate_training(load(), H100))
    assert terms["NF4 weights"] == 3_238_002_688
    assert terms["embedding, head, norms"] == 529_014_784  # 2 x 2 x 32,256 x 4,096 and 65 norms of 8,192
    assert terms["scales of the weights"] == 3_870_269_440 - 3_238_002_688 - 529_014_784
    assert terms["LoRA weights"] == terms["LoRA gradients"] == 4 * 159_907_840
    assert terms["optimizer state"] == 8 * 159_907_840
    assert terms["cuBLAS workspaces"] == 64 * MIB
    assert terms["CUDA context and kernels"] == 751 * MIB
    assert terms["kept by the driver"] == 480 * MIB


def test_what_a_block_keeps() -> None:
    # For a token: float32 inputs of two norms 8h, their outputs 4h; q, k, v and what attention gives 8h; a float32 for
    # each head and each norm; four times the MLP's width; 7 products of rank 64. And LoRA in 16 bits.
    h, inner = 4096, 11_008
    token = 12 * h + 8 * h + 4 * 32 + 2 * 4 + 4 * 2 * inner + 7 * 2 * 64
    kept = 1024 * token + 2 * 159_907_840 // 32
    assert block_forward(LARGE, PassSize(1024, 1024, 64)).kept_bytes == kept
    memory = estimate_training(load(), H100)
    assert memory.peak_moment == "the loss"
    # Nothing before the first block trains: its norm keeps neither its input nor the root.
    assert terms_of(memory)["kept activations"] == 32 * kept - 1024 * (4 * h + 4)


def test_a_block_with_grouped_heads_keeps_them_repeated() -> None:
    def kept(num_kv_heads: int, is_flash: bool) -> int:
        shape = read_model_shape(CONFIGS["6.7b"] | {"num_key_value_heads": num_kv_heads}, "m")
        casts = 2 * shape.num_lora_weights(64) // 32
        return block_forward(shape, PassSize(1024, 1024, 64, is_flash=is_flash)).kept_bytes - casts

    assert kept(8, True) == kept(32, True)
    assert kept(32, False) == kept(8, False)
    # Sample by sample attention's result is there once more, in the order of tokens.
    assert kept(32, False) - kept(32, True) == 1024 * 2 * 4096


def test_blocks_that_recompute_keep_their_input() -> None:
    memory = estimate_training(load(num_recomputed=32, num_tokens=4096), H100)
    terms = terms_of(memory)
    state = 4096 * 2 * 4096
    assert memory.peak_moment == "a block's second forward pass and its backward pass"
    assert terms["kept activations"] == 32 * state
    again = recomputed_backward(LARGE, PassSize(4096, 4096, 64)).peak_bytes
    rotation = 2 * 4096 * 2 * 128
    assert terms["largest transient"] == state + again + rotation
    # One block that keeps its activations has freed them by then.
    but_one = estimate_training(load(num_recomputed=31, num_tokens=64, rank=8), H100)
    assert but_one.peak_moment == memory.peak_moment
    assert terms_of(but_one)["kept activations"] == 31 * 64 * 2 * 4096


def test_the_loss_needs_a_chunk_of_logits_and_the_gradient_at_its_input() -> None:
    h, vocabulary, rows = 4096, 32_256, 1280
    # Float32 input of the last norm, root, output; states and the gradient at them; logits in float32 and in 16 bits.
    peak = 4096 * (4 * h + 4 + 2 * h) + 2 * 4096 * 2 * h + 6 * rows * vocabulary
    assert loss_and_head(LARGE, PassSize(4096, 4096, 64)).peak_bytes == peak
    # With few targets the norm's backward pass decides: its gradient twice and five copies of its input in float32.
    assert loss_and_head(LARGE, PassSize(4096, 100, 64)).peak_bytes == 4096 * (4 * h + 5 * 4 * h)


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (4 * 100_000, 512 * 1024),
        (512 * 1024, 512 * 1024),
        (512 * 1024 + 1, MIB),
        (MIB + 1, 2 * MIB),
        (2 * MIB, 2 * MIB),
        (2 * MIB + 1, 2 * MIB + MIB // 2),
        (64 * 11_008 * 4, 3 * MIB),
    ],
)
def test_a_paged_tensor_takes_what_the_driver_rounds_it_to(num_bytes: int, expected: int) -> None:
    assert paged_tensor_bytes(num_bytes) == expected


def test_optimizer_state_pages_as_a_whole() -> None:
    # Two moments of 159,907,840 weights in 4 bytes: 610 MiB each, a whole number of 512 KiB.
    assert optimizer_state_bytes(LARGE, 64, pages=True) == (0, 2 * 610 * MIB)
    # At rank 9 it is 85.78125 MiB: rounded up to 86. No tensor is too small to page by itself.
    assert optimizer_state_bytes(LARGE, 9, pages=True) == (0, 2 * 86 * MIB)
    assert optimizer_state_bytes(LARGE, 9, pages=False) == (8 * LARGE.num_lora_weights(9), 0)
    assert optimizer_state_bytes(LARGE, 64, pages=False) == (8 * LARGE.num_lora_weights(64), 0)


@pytest.mark.parametrize(("num_blocks", "does_page"), [(1, False), (2, True)])
def test_state_pages_from_100_000_values_on(num_blocks: int, does_page: bool) -> None:
    small = replace(LARGE, num_blocks=num_blocks)  # 78,080 weights a block at rank 1
    on_device, paged = optimizer_state_bytes(small, 1, pages=True)
    assert (paged > 0, on_device == 0) == (does_page, does_page)


def test_each_weight_begins_at_a_multiple_of_128_values() -> None:
    odd = read_model_shape(CONFIGS["6.7b"] | {"intermediate_size": 11_009}, "odd")
    padded = replace(
        LARGE, mlp_linears=read_model_shape(CONFIGS["6.7b"] | {"intermediate_size": 11_136}, "m").mlp_linears
    )
    assert lora_bytes(LARGE, 8) == 4 * LARGE.num_lora_weights(8)
    assert lora_bytes(odd, 1) == lora_bytes(padded, 1) == 4 * padded.num_lora_weights(1)


def test_the_one_tensor_is_as_large_as_it_says() -> None:
    import torch

    from dsft.core.engine.flat_lora import FlatLora

    shape = read_model_shape(
        CONFIGS["6.7b"]
        | {
            "hidden_size": 96,
            "intermediate_size": 131,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
        },
        "small",
    )
    sizes = [size for linear in shape.block_linears for size in (linear.num_inputs, linear.num_outputs)]
    weights = [torch.nn.Parameter(torch.zeros(5, size)) for _ in range(shape.num_blocks) for size in sizes]
    flat = FlatLora.each_alone(weights)
    assert lora_bytes(shape, 5) == flat.parameter.nbytes == flat.gradients.nbytes > 4 * shape.num_lora_weights(5)


# The sum


GRID = list(itertools.product((256, 1000, 4096), (8, 64), (0, 0.1, 1), (False, True)))


@each_shape
@pytest.mark.parametrize("card", [H100, RTX_4090, card_of_memory(8)], ids=lambda card: card.name)
def test_the_terms_add_up_to_what_the_device_shows(shape: ModelShape, card) -> None:
    for num_tokens, rank, share, pages in GRID:
        settings = {
            "num_recomputed": round(share * shape.num_blocks),
            "pages_optimizer": pages,
            "num_validation_tokens": 2000,
        }
        memory = estimate_training(load(shape, rank, num_tokens, **settings), card)
        assert sum(term.num_bytes for term in memory.terms) == memory.device_bytes
        assert all(term.num_bytes > 0 and term.formula for term in memory.terms)
        in_pytorch = sum(
            term.num_bytes
            for term in memory.terms
            if term.group != Group.OVERHEAD and term.name != "optimizer state, paged"
        )
        assert in_pytorch + terms_of(memory)["cuBLAS workspaces"] == memory.allocated_bytes
        assert memory.allocated_bytes < memory.reserved_bytes
        assert memory.reserved_bytes % (2 * MIB) == 0
        assert memory.device_bytes == memory.process_bytes + card.driver_bytes
        assert memory.least_process_bytes <= memory.process_bytes <= memory.most_process_bytes


def test_cuda_context_that_was_measured_takes_the_place_of_the_record() -> None:
    record = estimate_training(load(), RTX_4090)
    measured = estimate_training(load(), RTX_4090, context_bytes=RTX_4090.context_bytes + 5 * MIB)
    assert measured.device_bytes == record.device_bytes + 5 * MIB
    assert measured.reserved_bytes == record.reserved_bytes
    formulas = [next(t.formula for t in m.terms if t.name.startswith("CUDA")) for m in (record, measured)]
    assert "not measured" in formulas[0] and "measured on this card now" in formulas[1]


# How it moves


def figures(memory: TrainingMemory) -> tuple[int, int, int]:
    return memory.allocated_bytes, memory.reserved_bytes, memory.device_bytes


def assert_never_falls(memories: list[TrainingMemory], tolerance_bytes: int = 0) -> None:
    for before, after in itertools.pairwise(memories):
        assert all(a <= b + tolerance_bytes for a, b in zip(figures(before), figures(after), strict=True))
    assert memories[-1].device_bytes > memories[0].device_bytes


@each_shape
@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize("pages", [False, True])
def test_more_tokens_never_need_less(shape: ModelShape, share: float, pages: bool) -> None:
    settings = {"num_recomputed": round(share * shape.num_blocks), "pages_optimizer": pages}
    for rank in (8, 128):
        lengths = (1, 64, *range(128, 8193, 384), 65_536)
        assert_never_falls([estimate_training(load(shape, rank, n, **settings), H100) for n in lengths])
        batches = (512 * micro for micro in (1, 2, 3, 4, 6, 8, 16))
        assert_never_falls([estimate_training(load(shape, rank, n, **settings), RTX_4090) for n in batches])


@each_shape
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_a_higher_rank_never_needs_less(shape: ModelShape, share: float) -> None:
    recomputed = round(share * shape.num_blocks)
    for num_tokens in (256, 4096):
        ranks = (*range(1, 33), 48, 64, 100, 128, 256)
        plain = [estimate_training(load(shape, r, num_tokens, num_recomputed=recomputed), H100) for r in ranks]
        assert_never_falls(plain)
        paged = [
            estimate_training(load(shape, r, num_tokens, num_recomputed=recomputed, pages_optimizer=True), H100)
            for r in ranks
        ]
        # PyTorch's share may fall at the rank from which the state pages; what the process takes in all does not.
        totals = [memory.most_process_bytes for memory in paged]
        assert totals == sorted(totals)


@each_shape
@pytest.mark.parametrize("num_tokens", [64, 1024, 4096, 16_384])
def test_a_block_more_that_recomputes_needs_no_more(shape: ModelShape, num_tokens: int) -> None:
    for rank in (8, 128):
        memories = [
            estimate_training(load(shape, rank, num_tokens, num_recomputed=count), H100)
            for count in range(shape.num_blocks, -1, -1)
        ]
        # But for the gradient that waits while the last block runs again: one state, and PyTorch's 2 MiB steps.
        all_of_them, all_but_one = figures(memories[0]), figures(memories[1])
        most = 2 * num_tokens * shape.hidden_size + 2 * MIB
        assert all(a <= b + most for a, b in zip(all_of_them, all_but_one, strict=True))
        assert_never_falls(memories[1:], tolerance_bytes=2 * MIB)


@pytest.mark.parametrize("value_bytes", [2, 4])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2", "phi3", "starcoder2"])
def test_other_families_move_alike(family: str, value_bytes: int) -> None:
    shape = read_model_shape(CONFIGS["6.7b"] | {"model_type": family, "num_key_value_heads": 8}, family)
    settings = {"value_bytes": value_bytes, "is_flash": value_bytes == 2}
    assert_never_falls(
        [estimate_training(load(shape, 16, n, num_recomputed=9, **settings), H100) for n in range(128, 8193, 512)]
    )
    assert_never_falls(
        [estimate_training(load(shape, 16, 2048, num_recomputed=n, **settings), H100) for n in range(31, -1, -1)]
    )


# Paging


@each_shape
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_paging_moves_bytes_and_loses_none(shape: ModelShape, card) -> None:
    for num_tokens, rank in itertools.product((256, 4096), (8, 16, 64)):
        here = estimate_training(load(shape, rank, num_tokens), card)
        paged = estimate_training(load(shape, rank, num_tokens, pages_optimizer=True), card)
        on_device, pageable = optimizer_state_bytes(shape, rank, pages=True)
        assert paged.paged_bytes + paged.paged_out_bytes == pageable
        assert terms_of(paged).get("optimizer state, paged", 0) == paged.paged_bytes
        assert here.allocated_bytes - paged.allocated_bytes == 8 * shape.num_lora_weights(rank) - on_device
        assert (here.paged_bytes, here.paged_out_bytes) == (0, 0)
        room = card.usable_bytes - paged.least_process_bytes
        assert paged.paged_bytes == min(pageable, max(0, room))


# Validation


def test_validation_counts_only_where_its_samples_are_longer_and_need_more() -> None:
    def peak(num_validation_tokens: int, num_recomputed: int) -> tuple[int, str]:
        settings = {"num_validation_tokens": num_validation_tokens, "num_recomputed": num_recomputed}
        memory = estimate_training(load(num_tokens=1024, **settings), H100)
        return memory.allocated_bytes, memory.peak_moment

    for num_recomputed in (0, 32):
        without = peak(0, num_recomputed)
        assert peak(1, num_recomputed) == peak(1024, num_recomputed) == peak(1100, num_recomputed) == without
        longest = peak(200_000, num_recomputed)
        assert longest[0] > without[0] and longest[1] == "a validation pass"
        lengths = [peak(n, num_recomputed)[0] for n in range(1024, 40_000, 1111)]
        assert lengths == sorted(lengths)


def test_a_validation_pass_that_decides_keeps_nothing() -> None:
    memory = estimate_training(load(num_tokens=64, num_validation_tokens=65_536), H100)
    assert memory.peak_moment == "a validation pass"
    assert "kept activations" not in terms_of(memory)
    assert sum(term.num_bytes for term in memory.terms) == memory.device_bytes
