"""The advice after a run: what it says when, and that what it says is possible."""

import re
from typing import Any

import pytest

from dsft.core.config.schema import TrainConfig
from dsft.core.units import GIB
from dsft.train.advice import suggest_speedup
from tests.train_results import make_cpu_result, make_result

SHORT_SAMPLES = {"train_tok_per_s": 2400.0, "step_s_median": 1.0}
"""16 samples of 150 tokens a step."""

FREE = {"peak_memory_device_bytes": 8 * GIB}


def micro_batch_flags(advice: str | None) -> tuple[int, int]:
    assert advice is not None
    found = re.search(r"--per-device-train-batch-size (\d+) --gradient-accumulation-steps (\d+)", advice)
    assert found is not None, advice
    return int(found.group(1)), int(found.group(2))


def test_a_full_card_with_full_micro_batches_needs_no_advice() -> None:
    assert suggest_speedup(make_result()) is None


def test_free_memory_and_small_micro_batches_call_for_the_plan() -> None:
    literal = {"plan": "off"}
    advice = suggest_speedup(make_result(literal, **SHORT_SAMPLES, **FREE))
    assert advice is not None
    assert "--plan auto" in advice
    assert "8.0 GiB of 24.0 GiB" in advice
    full = {"peak_memory_device_bytes": 23 * GIB}
    assert "--plan" not in (suggest_speedup(make_result(literal, **SHORT_SAMPLES, **full)) or "")
    planned = make_result(**SHORT_SAMPLES, **FREE, plan={"splits_by_tokens": True})
    assert "--plan" not in (suggest_speedup(planned) or "")


@pytest.mark.parametrize("total_gib", [9, 10, 12, 16, 24, 80])
@pytest.mark.parametrize("fixed_gib", [5, 7])
def test_the_larger_micro_batch_fits_whatever_part_of_the_memory_is_fixed(total_gib: int, fixed_gib: int) -> None:
    result = make_cpu_result(**SHORT_SAMPLES, peak_host_memory_bytes=8 * GIB, memory_total_bytes=total_gib * GIB)
    advice = suggest_speedup(result)
    factor = micro_batch_flags(advice)[0] if advice is not None and "batch-size" in advice else 1
    assert fixed_gib + (8 - fixed_gib) * factor <= total_gib


def test_micro_batches_that_keep_the_gpu_busy_are_left_alone() -> None:
    busy = make_result({"max_length": 8192}, train_tok_per_s=16 * 8000.0, **FREE)
    assert suggest_speedup(busy) is None


def test_without_known_memory_no_larger_micro_batch_is_promised() -> None:
    result = make_result(**SHORT_SAMPLES, **FREE, memory_total_bytes=None)
    assert "--plan" not in (suggest_speedup(result) or "")


def test_a_cpu_gets_larger_micro_batches_too_but_no_packing() -> None:
    assert micro_batch_flags(suggest_speedup(make_cpu_result(**SHORT_SAMPLES))) == (8, 2)
    whole = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    assert suggest_speedup(make_cpu_result(whole, **SHORT_SAMPLES, num_steps=5000)) is None


def test_short_samples_call_for_packing_when_the_micro_batch_can_grow_no_more() -> None:
    advice = suggest_speedup(make_result(**SHORT_SAMPLES, num_steps=3000))
    assert advice is not None
    assert "--packing" in advice
    assert "150 of 1,024" in advice


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"packing": True}, {"num_steps": 3000}),
        ({}, {"num_steps": 300}),  # 44 steps would be left
        ({"max_length": 256}, {"num_steps": 3000}),  # more than half full
    ],
)
def test_packing_is_not_advised_where_it_is_on_or_leaves_too_little(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert suggest_speedup(make_result(config, **SHORT_SAMPLES, **changes)) is None


def test_waiting_for_data_calls_for_workers() -> None:
    advice = suggest_speedup(make_result(duration_s=100.0, data_wait_s=30.0))
    assert advice is not None
    assert "30 %" in advice
    assert "--dataloader-num-workers" in advice
    assert suggest_speedup(make_result(duration_s=100.0, data_wait_s=5.0)) is None
    assert suggest_speedup(make_result({"dataloader_num_workers": 2}, duration_s=100.0, data_wait_s=30.0)) is None


def test_32_bits_on_a_gpu_are_noticed_and_on_a_cpu_are_not() -> None:
    assert "--precision auto" in (suggest_speedup(make_result({"precision": "fp32"})) or "")
    assert "--precision" not in (suggest_speedup(make_cpu_result({"precision": "fp32"})) or "")


def test_a_run_without_measured_steps_gets_no_advice() -> None:
    assert suggest_speedup(make_result(train_tok_per_s=0.0, step_s_median=0.0, **FREE)) is None


def test_every_flag_that_is_named_exists() -> None:
    results = [
        make_result(**SHORT_SAMPLES, **FREE),
        make_result(**SHORT_SAMPLES, num_steps=3000),
        make_result(data_wait_s=700.0),
        make_result({"precision": "fp32"}),
    ]
    advices = [suggest_speedup(result) or "" for result in results]
    assert all(advices)
    flags = {flag for advice in advices for flag in re.findall(r"--([a-z-]+)", advice)}
    assert {flag.replace("-", "_") for flag in flags} <= set(TrainConfig.model_fields)
