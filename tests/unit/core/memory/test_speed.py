"""The predicted time of a step: what it follows from and how it moves."""

import itertools
from dataclasses import replace

import pytest

from dsft.core.memory.cards import H100, RTX_4090, find_card
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, read_model_shape
from dsft.core.memory.speed import StepTime, matmul_share, predict_step

SHAPE = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7b")


def predict(card=RTX_4090, rank: int = 64, **settings: float) -> StepTime:
    arguments = {"step_tokens": 16_384, "num_passes": 4, "num_recomputed": 0} | settings
    return predict_step(SHAPE, rank, card, **arguments)  # type: ignore[arg-type]


def test_a_step_takes_at_least_the_time_of_its_matrix_products() -> None:
    # Two products of 6.48e9 block weights for a token, two of LoRA's and its own, two of the head's.
    flops = 16_384 * (4 * 6_476_005_376 + 6 * 159_907_840 + 4 * 32_256 * 4_096)
    bound_s = flops / (165e12 * matmul_share(RTX_4090))
    assert bound_s < predict().step_s < 2 * bound_s


def test_the_step_grows_with_tokens_rank_and_blocks_that_recompute() -> None:
    for card in (H100, RTX_4090, find_card("T4")):
        for settings in (
            [{"step_tokens": n} for n in (1000, 4096, 8192, 65_536)],
            [{"rank": n} for n in (8, 16, 64, 256)],
            [{"num_recomputed": n} for n in range(33)],
            [{"paged_bytes": n} for n in (0, 10**8, 10**9)],
        ):
            times = [predict(card, **each).step_s for each in settings]
            assert times == sorted(times) and times[0] < times[-1], settings


def test_more_passes_never_take_less_time() -> None:
    for card, tokens in itertools.product((H100, RTX_4090), (1000, 16_384, 50_000)):
        times = [predict(card, step_tokens=tokens, num_passes=n).step_s for n in (1, 2, 3, 8, 32, 200)]
        assert times == sorted(times)


def test_many_small_passes_wait_for_the_host() -> None:
    small = predict(H100, step_tokens=4096, num_passes=64)
    large = predict(H100, step_tokens=65_536, num_passes=4)
    assert small.is_launch_bound and not large.is_launch_bound
    # Where the host decides, a faster card changes nothing.
    assert predict(replace(H100, matmul_flops=2e15), step_tokens=4096, num_passes=64).step_s == small.step_s


def test_state_that_pages_crosses_the_link_twice() -> None:
    assert predict(paged_bytes=20 * 10**9).step_s - predict().step_s == pytest.approx(2.0)


def test_a_faster_card_is_faster() -> None:
    cards = [find_card(name) for name in ("T4", "RTX 3090 Ti", "RTX 4090", "H100")]
    times = [predict(card).step_s for card in cards]
    assert times == sorted(times, reverse=True)
    assert all(0 < matmul_share(card) < 1 for card in cards)


# The engine


def test_the_engine_is_faster_and_bound_by_its_products() -> None:
    for card, passes in itertools.product((H100, RTX_4090, find_card("T4")), (1, 4, 16, 64)):
        for recomputed in (0, 8, 32):
            plain, engine = (
                predict(card, num_passes=passes, num_recomputed=recomputed, uses_engine=uses) for uses in (False, True)
            )
            assert engine.step_s < plain.step_s
    flops = 16_384 * (4 * 6_476_005_376 + 6 * 159_907_840 + 4 * 32_256 * 4_096)
    bound_s = flops / (H100.matmul_flops * matmul_share(H100))
    assert bound_s < predict(H100, uses_engine=True).step_s < 1.5 * bound_s


def test_the_engines_step_grows_with_tokens_rank_passes_and_blocks_that_recompute() -> None:
    for settings in (
        [{"step_tokens": n} for n in (1000, 4096, 8192, 65_536)],
        [{"rank": n} for n in (8, 16, 64, 256)],
        [{"num_recomputed": n} for n in range(33)],
        [{"num_passes": n} for n in (1, 2, 16, 200)],
    ):
        times = [predict(H100, uses_engine=True, **each).step_s for each in settings]
        assert times == sorted(times) and times[0] < times[-1], settings


def test_norms_of_heads_move_more() -> None:
    settings = {"step_tokens": 16_384, "num_passes": 4, "num_recomputed": 0, "uses_engine": True}
    normed = replace(SHAPE, normalized_head_values=2 * 4096)
    assert predict_step(normed, 64, H100, **settings).step_s > predict_step(SHAPE, 64, H100, **settings).step_s  # type: ignore[arg-type]
