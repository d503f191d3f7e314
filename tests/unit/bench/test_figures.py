"""The arithmetic on measured steps, against cases calculated by hand."""

import pytest

from dsft.bench.figures import (
    MemoryFigures,
    StepFigures,
    compare_memory,
    count_padded,
    count_useful_flops,
    count_useful_flops_per_s,
    error_percent,
    measure_speed,
    measure_spread,
)
from dsft.core.memory.model_shape import read_model_shape

SHAPE = read_model_shape(
    {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    },
    "small",
)


def test_a_spread_is_median_extremes_and_quartiles() -> None:
    spread = measure_spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.median, spread.min, spread.max, spread.q1, spread.q3) == (3.0, 1.0, 5.0, 2.0, 4.0)
    between = measure_spread([1.0, 2.0, 3.0, 4.0])
    assert (between.median, between.q1, between.q3) == (2.5, 1.75, 3.25)


def test_the_spread_of_one_value_is_that_value() -> None:
    spread = measure_spread([7.0])
    assert {spread.median, spread.min, spread.max, spread.q1, spread.q3} == {7.0}


def test_rates_are_medians_over_the_steps() -> None:
    steps = [
        StepFigures(2.0, 100, 50, 120, 1),  # 50 tok/s, 25 targets, 60 padded
        StepFigures(1.0, 90, 20, 90, 1),  # 90, 20, 90
        StepFigures(10.0, 100, 10, 200, 2),  # 10, 1, 20
    ]
    speed = measure_speed(steps)
    assert (speed.tok_per_s, speed.target_tok_per_s, speed.padded_tok_per_s) == (50.0, 20.0, 60.0)
    assert speed.step_s.median == 2.0
    assert speed.steps == tuple(steps)


def test_padding_counts_every_sample_as_the_longest() -> None:
    assert count_padded(num_samples=3, longest=7) == 21


def test_useful_operations_of_a_small_model() -> None:
    # A block: four attention layers of 8 x 8 and three of 8 x 16; two blocks; the head 32 x 8.
    linear_weights = 2 * (4 * 64 + 3 * 128)
    assert count_useful_flops(SHAPE, num_tokens=10, num_targets=5) == 4 * linear_weights * 10 + 4 * 256 * 5


def test_useful_operations_of_the_real_model_are_the_known_ones() -> None:
    """26.4 GFLOP a token: 2 forward and 2 backward for each of 6.48 G linear weights, head included."""
    real = read_model_shape(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 32256,
        },
        "6.7b",
    )
    assert count_useful_flops(real, 1, 1) == pytest.approx(26.4e9, rel=0.01)


def test_useful_operations_a_second_are_the_median_of_the_steps() -> None:
    steps = [StepFigures(seconds, 10, 5, 10, 1) for seconds in (1.0, 2.0, 8.0)]
    assert count_useful_flops_per_s(SHAPE, steps) == count_useful_flops(SHAPE, 10, 5) / 2.0


def test_an_error_is_negative_where_the_prediction_is_too_low() -> None:
    assert error_percent(98, 100) == pytest.approx(-2.0)
    assert error_percent(105, 100) == pytest.approx(5.0)


def test_only_what_was_measured_is_compared() -> None:
    predicted = MemoryFigures(110, 220, 330)
    assert compare_memory(predicted, MemoryFigures(100, 200, None)) == pytest.approx({"allocated": 10, "reserved": 10})
    assert compare_memory(predicted, MemoryFigures(100, 200, 300))["device"] == pytest.approx(10)
