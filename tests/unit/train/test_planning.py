"""The plan of a run on a GPU, with a made-up driver: what it sees of the card, what it refuses, what it keeps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import dsft.train.planning as planning
from dsft.core.config.schema import TrainConfig
from dsft.core.errors import DoesNotFitError
from dsft.core.gpu import GpuMemory
from dsft.core.memory.cards import KERNELS_BYTES
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, read_model_shape
from dsft.core.memory.plan import Workload, assess
from dsft.core.models.attention import VARLEN, AttentionKernel
from dsft.core.models.device import Device
from dsft.core.units import GIB
from dsft.train.batches import EffectiveBatchSampler
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
        can_oversubscribe: bool = True,
        uses_engine: bool = False,
        **settings: object,
    ) -> RunPlan:
        readings = [GpuMemory(used * MIB, total_mib * MIB) for used in (used_mib, used_mib + context_mib)]

        class Reader:
            def read(self) -> GpuMemory:
                return readings.pop(0)

        monkeypatch.setattr(planning, "open_gpu_memory", lambda uuid: Reader())
        monkeypatch.setattr(planning, "open_context", lambda: None)
        monkeypatch.setattr(planning, "can_oversubscribe", lambda: can_oversubscribe)
        view = look_at_card(replace(CARD, total_bytes=total_mib * MIB))
        return plan_run(
            TrainConfig(**settings),
            view,
            precision="bf16",
            attention=KERNEL,
            shape=SHAPE,
            workload=workload,
            uses_engine=uses_engine,
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


def test_with_the_engine_fewer_blocks_recompute_and_memory_is_that_of_its_path(plan: Callable[..., RunPlan]) -> None:
    plain, engine = (plan(total_mib=16384, micro_batch=2, uses_engine=uses_engine) for uses_engine in (False, True))
    assert engine.plan.num_recomputed < plain.plan.num_recomputed
    names = [{term.name for term in each.predict(1024, 1000, each.plan).terms} for each in (plain, engine)]  # type: ignore[union-attr]
    assert names[1] - names[0] >= {"LoRA weights, 16-bit copy", "dequantization workspace", "engine's tables"}


def test_a_context_that_can_not_be_one_is_not_believed(plan: Callable[..., RunPlan]) -> None:
    run_plan = plan(context_mib=9000)  # another process came in between
    assert run_plan.job is not None
    assert run_plan.job.context_bytes is None


def test_vram_plans_for_a_smaller_card_and_holds_the_allocator_to_it(plan: Callable[..., RunPlan]) -> None:
    run_plan = plan(total_mib=81559, vram=24.0)
    assert run_plan.job is not None
    memory = assess(run_plan.job, run_plan.plan).memory
    assert memory.process_bytes <= 23.54 * GIB
    assert run_plan.limit_for(run_plan.plan) == run_plan.job.budget_bytes - memory.context_bytes - memory.paged_bytes
    assert not run_plan.job.is_card_full  # the card has more, so paged state would stay on it
    assert plan(vram=24.0).job.budget_bytes <= (24564 - 500) * MIB  # type: ignore[union-attr]
    assert plan().limit_for(plan().plan) is None


def test_a_smaller_plan_stays_within_the_budget_and_so_does_its_limit(plan: Callable[..., RunPlan]) -> None:
    run_plan = plan(total_mib=81559, vram=16.0, lora_r=256)
    assert run_plan.job is not None
    now = run_plan.plan
    for _ in range(20):
        memory = assess(run_plan.job, now).memory
        limit = run_plan.limit_for(now)
        assert limit is not None
        # Paged state stays on a card that has room, and counts.
        assert memory.most_process_bytes <= run_plan.job.budget_bytes
        assert limit + memory.context_bytes + memory.paged_bytes <= run_plan.job.budget_bytes
        try:
            now = run_plan.shrink(now, 0)
        except DoesNotFitError:
            break


def test_on_a_card_that_is_full_the_limit_leaves_the_margin(plan: Callable[..., RunPlan]) -> None:
    run_plan = plan(total_mib=12288, vram=12.0, lora_r=128)
    assert run_plan.job is not None
    assert run_plan.job.is_card_full
    memory = assess(run_plan.job, run_plan.plan).memory
    limit = run_plan.limit_for(run_plan.plan)
    assert limit is not None
    assert memory.paged_out_bytes > 0
    assert limit - memory.reserved_bytes >= 0.9 * (run_plan.job.budget_bytes - run_plan.job.allowed_bytes)


def test_a_run_held_back_by_vram_is_told_so(plan: Callable[..., RunPlan]) -> None:
    with pytest.raises(DoesNotFitError) as error:
        plan(total_mib=81559, vram=8.0, lora_r=256)
    assert "a higher --vram" in error.value.fix
    assert "closing other programs" not in error.value.fix
    with pytest.raises(DoesNotFitError) as error:
        plan(total_mib=8192, used_mib=4000)
    assert "closing other programs" in error.value.fix
    assert "a GPU with" in error.value.fix


def test_state_that_can_not_page_out_counts_whole(plan: Callable[..., RunPlan]) -> None:
    paged = {"page_optimizer": "yes", "total_mib": 10240}
    with_room, without = plan(**paged), plan(**paged, can_oversubscribe=False)
    assert with_room.job is not None
    assert without.job is not None
    assert with_room.job.is_card_full
    assert not without.job.is_card_full
    assert assess(without.job, without.plan).memory.most_process_bytes <= without.job.allowed_bytes
    assert assess(with_room.job, with_room.plan).memory.most_process_bytes > with_room.job.allowed_bytes


def test_without_nvml_or_on_a_part_of_a_card_cuda_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "open_context", lambda: None)
    monkeypatch.setattr(planning, "read_device_memory", lambda: (15 * GIB, 20 * GIB))
    monkeypatch.setattr(planning, "open_gpu_memory", lambda uuid: None)
    view = look_at_card(CARD)
    assert view is not None
    assert view.card.total_bytes == 20 * GIB
    # Of the 5 GiB in use the bare context is this process's own.
    assert view.card.usable_bytes == 15 * GIB + view.card.context_bytes - KERNELS_BYTES

    class WholeCard:
        def read(self) -> GpuMemory:
            return GpuMemory(1 * GIB, 80 * GIB)

    monkeypatch.setattr(planning, "open_gpu_memory", lambda uuid: WholeCard())
    assert look_at_card(CARD) == view


def test_what_fits_only_without_the_margin_is_refused(plan: Callable[..., RunPlan]) -> None:
    literal = plan(plan="off")
    assert literal.job is not None
    memory = assess(literal.job, literal.plan).memory
    needed = memory.least_process_bytes
    just_under_mib = 500 + round(needed / MIB / 0.98)
    with pytest.raises(DoesNotFitError, match="more than the"):
        plan(plan="off", total_mib=just_under_mib)


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
    write_plan(small.plan, tmp_path, uses_engine=False)
    assert keep_checkpoint_plan(large, tmp_path) == (replace(large, plan=small.plan), None)
    write_plan(large.plan, tmp_path, uses_engine=False)
    kept, notice = keep_checkpoint_plan(small, tmp_path)
    assert kept == small
    assert notice is not None and "needs" in notice
    decided = plan(micro_batch=1)
    write_plan(plan(micro_batch=4).plan, tmp_path, uses_engine=False)
    assert keep_checkpoint_plan(decided, tmp_path) == (decided, None)
    write_plan(small.plan, tmp_path, uses_engine=True)  # for other blocks
    assert keep_checkpoint_plan(large, tmp_path) == (large, None)
    (tmp_path / planning.PLAN_RECORD).unlink()  # of an earlier version
    assert keep_checkpoint_plan(large, tmp_path) == (large, None)


def test_a_plan_that_no_longer_fits_is_noticed_in_the_summary_too(plan: Callable[..., RunPlan], tmp_path: Path) -> None:
    from dsft.train.events import Notice
    from dsft.train.fit import _with_checkpoint_plan

    write_plan(plan(total_mib=24564).plan, tmp_path, uses_engine=False)
    told: list[object] = []
    setup = _FakeSetup(plan(total_mib=9000), ("earlier",))
    changed = _with_checkpoint_plan(setup, tmp_path, told.append)  # type: ignore[arg-type]
    [notice] = told
    assert isinstance(notice, Notice)
    assert changed.notices == ("earlier", notice.text)
    assert changed.run_plan.plan == setup.run_plan.plan


@dataclass(frozen=True)
class _FakeSetup:
    run_plan: RunPlan
    notices: tuple[str, ...]


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
            for step in (lengths[indices].tolist() for indices in steps_of(order))
            for group in planning_groups(step, made)
        )
        assert tokens <= made.micro_batch_tokens


def planning_groups(lengths: list[int], made: planning.ExecutionPlan) -> list[list[int]]:
    from dsft.train.batches import split_sequences

    groups = split_sequences(lengths, made)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    return groups


def steps_of(order: StepOrder) -> list[np.ndarray]:
    sampler = EffectiveBatchSampler(len(order.lengths), order.effective_batch_size, order.seed)
    steps = []
    for epoch in range(1 + order.num_steps // len(sampler)):
        sampler.set_epoch(epoch)
        steps += [np.array(indices) for indices in sampler]
    return steps[: order.num_steps]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_largest_micro_batch_by_number_is_the_largest_of_all_steps(seed: int, size: int) -> None:
    lengths = np.random.default_rng(seed).integers(20, 200, 3000)
    lengths[1234] = 1024  # one long sample among many
    order = StepOrder(lengths, 4, seed, num_steps=1700)
    made = planning.ExecutionPlan(size, 10**6, False, 0, False, 0)
    expected = max(
        sum(step[index] for index in group)
        for step in (lengths[indices].tolist() for indices in steps_of(order))
        for group in planning_groups(step, made)
    )
    assert int(lengths[order.largest_micro_batch(made)].sum()) == expected
    workload = order.workload(0)
    assert workload.max_step_tokens == max(int(lengths[indices].sum()) for indices in steps_of(order))
    assert workload.mean_step_tokens == pytest.approx(np.mean([lengths[indices].sum() for indices in steps_of(order)]))


def test_millions_of_steps_are_not_listed() -> None:
    order = StepOrder(np.full(100, 50), 4, 0, num_steps=20_000_000)
    assert order.workload(0).max_step_tokens == 200
    assert len(order._epochs) <= 20_000
