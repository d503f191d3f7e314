"""Settings as a planning job: each execution setting decides what it says, and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from dsft.core.errors import ConfigError
from dsft.core.memory.cards import find_card
from dsft.core.memory.plan import Fixed
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.model import find_shape
from dsft.estimate_memory.plans import fix_settings, make_job, plan_training
from dsft.estimate_memory.run import break_down
from tests.unit.estimate_memory.estimates import BUDGET, configure, write_model

MODEL = find_shape(configure(model_name="deepseek-ai/deepseek-coder-1.3b-base"))
T4 = Budget(find_card("T4"), "gpu")


@pytest.mark.parametrize(
    ("flags", "fixed"),
    [
        ({}, Fixed(None, None, None)),
        ({"micro_batch": 4}, Fixed(4, None, None)),
        ({"micro_batch": 64}, Fixed(16, None, None)),
        ({"recompute_blocks": 3}, Fixed(None, 3, None)),
        ({"gradient_checkpointing": False}, Fixed(None, 0, None)),
        ({"gradient_checkpointing": False, "recompute_blocks": 5}, Fixed(None, 5, None)),
        ({"page_optimizer": "yes"}, Fixed(None, None, True)),
        ({"page_optimizer": "no"}, Fixed(None, None, False)),
        ({"optimizer": "adamw"}, Fixed(None, None, False)),
        ({"optimizer": "adamw", "page_optimizer": "yes"}, Fixed(None, None, False)),
        ({"plan": "off"}, Fixed(1, 24, True)),
        ({"plan": "off", "per_device_train_batch_size": 2, "gradient_checkpointing": False}, Fixed(2, 0, True)),
        ({"plan": "off", "micro_batch": 4, "recompute_blocks": 7, "page_optimizer": "no"}, Fixed(4, 7, False)),
        ({"plan": "off", "optimizer": "adamw"}, Fixed(1, 24, False)),
    ],
)
def test_settings_decide_the_plan(flags: dict[str, Any], fixed: Fixed) -> None:
    config = configure(**flags)
    assert fix_settings(config, MODEL.shape.num_blocks) == fixed
    plan = plan_training(config, MODEL, BUDGET).chosen.plan
    for decided, taken in (
        (fixed.micro_batch_size, plan.micro_batch_size),
        (fixed.num_recomputed, plan.num_recomputed),
        (fixed.pages_optimizer, plan.pages_optimizer),
    ):
        assert decided is None or decided == taken


def test_a_plan_that_is_off_is_the_settings_as_written() -> None:
    planned = plan_training(configure(plan="off"), MODEL, BUDGET)
    assert planned.chosen == planned.literal
    assert planned.speed_up == 1


def test_more_blocks_than_there_are_recompute_as_all() -> None:
    for plan in ("auto", "off"):
        planned = plan_training(configure(plan=plan, recompute_blocks=99), MODEL, BUDGET)
        assert planned.chosen.plan.num_recomputed == 24


def test_the_job_is_of_full_sequences() -> None:
    job = make_job(configure(max_length=512, lora_r=8, gradient_accumulation_steps=4), MODEL, BUDGET)
    workload = job.workload
    assert (workload.longest_sequence, workload.max_step_tokens, workload.longest_validation) == (512, 2048, 512)
    assert (job.rank, job.budget_bytes, job.value_bytes, job.is_flash) == (8, BUDGET.card.usable_bytes, 2, True)
    assert make_job(configure(validation_split=0), MODEL, BUDGET).workload.longest_validation == 0


def test_float32_takes_four_bytes_and_no_flash_kernel() -> None:
    job = make_job(configure(precision="fp32"), MODEL, BUDGET)
    assert (job.value_bytes, job.is_flash) == (4, False)


def test_an_old_card_computes_in_fp16_without_a_flash_kernel() -> None:
    job = make_job(configure(), MODEL, T4)
    assert (job.value_bytes, job.is_flash) == (2, False)
    with pytest.raises(ConfigError, match="T4 has no bfloat16"):
        make_job(configure(precision="bf16"), MODEL, T4)


def test_the_speed_up_is_over_the_settings_as_written() -> None:
    planned = plan_training(configure(max_length=256), MODEL, BUDGET)
    assert planned.speed_up == planned.literal.time.step_s / planned.chosen.time.step_s > 1
    assert planned.tok_per_s == 16 * 256 / planned.chosen.time.step_s


@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({}, {}, None),
        ({"model_type": "qwen3", "head_dim": 128}, {}, None),
        ({}, {"engine": "off"}, None),
        ({}, {"lora_dropout": 0.1}, "the engine has no dropout in LoRA"),
        ({"model_type": "olmo2"}, {}, "the family olmo2"),
        ({"head_dim": 80}, {}, "not 80"),
        ({"hidden_act": "gelu"}, {}, "the activation is gelu"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, {}, "a part of each head"),
    ],
)
def test_the_engine_is_planned_for_where_it_computes_the_model(
    changes: dict[str, Any], flags: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    config = configure(model_name=write_model(tmp_path / "model", **changes), **flags)
    model = find_shape(config)
    is_off = flags.get("engine") == "off"
    assert make_job(config, model, BUDGET).uses_engine is (reason is None and not is_off)
    notices = break_down(config, BUDGET).notices
    if reason is None:
        assert notices == ()
    else:
        assert reason in notices[0]
    names = {term.name for term in plan_training(config, model, BUDGET).chosen.memory.terms}
    assert ("dequantization workspace" in names) is (reason is None and not is_off)
