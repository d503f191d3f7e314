"""The plan of a run on a GPU, with a made-up driver: what it sees of the card, what it refuses, what it keeps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dsft.train.planning as planning
from dsft.core.config.schema import TrainConfig
from dsft.core.errors import DoesNotFitError
from dsft.core.gpu import GpuMemory
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, read_model_shape
from dsft.core.memory.plan import Workload
from dsft.core.models.attention import VARLEN, AttentionKernel
from dsft.core.models.device import Device
from dsft.core.units import GIB
from dsft.train.planning import RunPlan, keep_checkpoint_plan, look_at_card, plan_run, write_plan
from dsft.train.rehearsal import StepOrder

MIB = 1024**2
SHAPE = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7B")
CARD = Device("cuda", "NVIDIA GeForce RTX 4090", (8, 9), "uuid", 24564 * MIB, 128)
KERNEL = AttentionKernel(VARLEN, "flash")
FULL = Workload.of_full_sequences(16, 1024)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunPlan]:
    def make(
        used_mib: int = 500,
        context_mib: int = 480,
        total_mib: int = 24564,
        workload: Workload = FULL,
        **settings: object,
    ) -> RunPlan:
        readings = [GpuMemory(used * MIB, total_mib * MIB) for used in (used_mib, used_mib + context_mib)]

        class Reader:
            def read(self) -> GpuMemory:
                return readings.pop(0)

        monkeypatch.setattr(planning, "open_gpu_memory", lambda uuid: Reader())
        monkeypatch.setattr(planning, "open_context", lambda: None)
        view = look_at_card(CARD)
        return plan_run(
            TrainConfig(**settings), view, precision="bf16", attention=KERNEL, shape=SHAPE, workload=workload
        )

    return make


def test_the_budget_is_what_is_free_and_the_context_is_measured(plan: Callable[..., RunPlan]) -> None:
    run_plan = plan(used_mib=3000)
    assert run_plan.job is not None
    assert run_plan.job.budget_bytes == (24564 - 3000) * MIB
    assert run_plan.job.context_bytes == (480 + 140) * MIB
    memory = run_plan.predict(1024, 1000, run_plan.plan)
    assert memory is not None
    assert memory.driver_bytes == 3000 * MIB  # what was in use before counts as the device shows it


def test_a_context_that_can_not_be_one_is_not_believed(plan: Callable[..., RunPlan]) -> None:
    run_plan = plan(context_mib=9000)  # another process came in between
    assert run_plan.job is not None
    assert run_plan.job.context_bytes is None


def test_vram_plans_for_a_smaller_card_and_holds_the_allocator_to_it(plan: Callable[..., RunPlan]) -> None:
    run_plan = plan(total_mib=81559, vram=24.0)
    assert run_plan.job is not None
    assert run_plan.limit_bytes is not None
    memory = run_plan.assess().memory  # type: ignore[union-attr]
    assert memory.process_bytes <= 23.54 * GIB
    assert run_plan.limit_bytes == run_plan.job.budget_bytes - memory.context_bytes - memory.paged_bytes
    assert not run_plan.job.is_card_full  # the card has more, so paged state would stay on it
    assert plan(vram=24.0).job.budget_bytes <= (24564 - 500) * MIB  # type: ignore[union-attr]


def test_the_user_s_decisions_are_kept(plan: Callable[..., RunPlan]) -> None:
    made = plan(micro_batch=2, recompute_blocks=20, page_optimizer="yes").plan
    assert (made.micro_batch_size, made.num_recomputed, made.pages_optimizer) == (2, 20, True)
    assert plan(gradient_checkpointing=False).plan.num_recomputed == 0
    assert not plan(optimizer="adamw", page_optimizer="yes").plan.pages_optimizer
    literal = plan(plan="off", per_device_train_batch_size=2, gradient_accumulation_steps=8)
    assert (literal.plan.micro_batch_size, literal.plan.splits_by_tokens) == (2, False)
    assert (literal.plan.num_recomputed, literal.plan.pages_optimizer) == (32, True)


def test_what_can_not_fit_is_refused_with_what_would_help(plan: Callable[..., RunPlan]) -> None:
    with pytest.raises(DoesNotFitError) as error:
        plan(total_mib=8192, lora_r=256)
    assert "GiB more than the" in error.value.found
    assert "--lora-r" in error.value.fix
    assert "saves" in error.value.fix
    with pytest.raises(DoesNotFitError) as error:
        plan(total_mib=10240, gradient_checkpointing=False)
    assert "--recompute-blocks" in error.value.fix


def test_a_literal_plan_that_does_not_fit_is_told_of_the_one_that_does(plan: Callable[..., RunPlan]) -> None:
    with pytest.raises(DoesNotFitError, match="--plan auto"):
        plan(total_mib=12288, plan="off", per_device_train_batch_size=16, gradient_accumulation_steps=1)


def test_shrinking_ends_with_an_error(plan: Callable[..., RunPlan]) -> None:
    run_plan = plan()
    assert run_plan.job is not None
    now, needs = run_plan.plan, []
    while len(needs) < 1000:
        needs.append(planning.assess(run_plan.job, now).memory.least_process_bytes)
        try:
            now = run_plan.shrink(now, 10**12)
        except DoesNotFitError as error:
            assert "closing other programs" in error.fix  # noqa: PT017
            break
    assert 3 < len(needs) < 1000
    assert needs == sorted(needs, reverse=True)
    literal = plan(plan="off")
    with pytest.raises(DoesNotFitError):
        literal.shrink(literal.plan, 10**12)


def test_a_checkpoint_s_plan_is_kept_unless_it_no_longer_fits(plan: Callable[..., RunPlan], tmp_path: Path) -> None:
    large = plan(total_mib=24564)
    small = plan(total_mib=9000)
    assert large.plan != small.plan
    write_plan(small.plan, tmp_path)
    assert keep_checkpoint_plan(large, tmp_path) == (replace(large, plan=small.plan), None)
    write_plan(large.plan, tmp_path)
    kept, notice = keep_checkpoint_plan(small, tmp_path)
    assert kept == small
    assert notice is not None and "needs" in notice
    decided = plan(micro_batch=1)
    write_plan(plan(micro_batch=4).plan, tmp_path)
    assert keep_checkpoint_plan(decided, tmp_path) == (decided, None)
    (tmp_path / planning.PLAN_RECORD).unlink()  # of an earlier version
    assert keep_checkpoint_plan(large, tmp_path) == (large, None)


def test_the_largest_micro_batch_of_a_run_is_found(plan: Callable[..., RunPlan]) -> None:
    lengths = np.random.default_rng(0).integers(20, 800, 500)
    order = StepOrder(lengths, 16, seed=3, num_steps=80)
    workload = order.workload(longest_validation=0)
    assert workload.longest_sequence == lengths.max()
    for size in (1, 2, 4):
        made = replace(plan(micro_batch=size, workload=workload).plan, micro_batch_tokens=1500 * size)
        tokens = int(lengths[order.largest_micro_batch(made)].sum())
        assert tokens == max(
            sum(step[index] for index in group)
            for step in (lengths[indices].tolist() for indices in order._steps())
            for group in planning_groups(step, made)
        )
        assert tokens <= made.micro_batch_tokens


def planning_groups(lengths: list[int], made: planning.ExecutionPlan) -> list[list[int]]:
    from dsft.train.batches import split_sequences

    groups = split_sequences(lengths, made)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    return groups
