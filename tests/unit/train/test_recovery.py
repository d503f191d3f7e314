"""Plans change speed and memory, never the result; running out of memory repeats the step under a smaller one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dsft.train.recovery as recovery
import dsft.train.trainer as trainer_module
from dsft.core.errors import DoesNotFitError, is_gpu_out_of_memory, is_out_of_memory
from dsft.core.memory.plan import ExecutionPlan
from dsft.train.batches import MicroBatch
from dsft.train.loss import sum_target_losses
from dsft.train.planning import PLAN_RECORD
from dsft.train.recovery import PlanChange, PlanRunner, reserve_optimizer_state
from tests.unit.train.random_samples import make_samples
from tests.unit.train.test_trainer import Run, lora_weights, make_literal_plan

PLANS = {
    "one by one": make_literal_plan(1),
    "all at once, recomputed": make_literal_plan(4, num_recomputed=2),
    "by tokens": replace(make_literal_plan(4), splits_by_tokens=True, micro_batch_tokens=60),
    "by tokens, one block recomputed": replace(
        make_literal_plan(4, num_recomputed=1), splits_by_tokens=True, micro_batch_tokens=40
    ),
}


@pytest.fixture
def break_passes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let chosen forward passes, counted from 0 over the run, fail as a full GPU makes them."""

    def install(*failing: int, training_only: bool = True) -> list[int]:
        sizes: list[int] = []

        def sum_or_fail(model: torch.nn.Module, batch: MicroBatch, **options: bool) -> torch.Tensor:
            if training_only and not model.training:
                return sum_target_losses(model, batch, **options)
            sizes.append(batch.num_tokens)
            if len(sizes) - 1 in failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return sum_target_losses(model, batch, **options)

        monkeypatch.setattr(trainer_module, "sum_target_losses", sum_or_fail)
        return sizes

    return install


def halve(failed: ExecutionPlan, free_bytes: int) -> ExecutionPlan:
    if failed.micro_batch_size == 1:
        raise DoesNotFitError("The GPU's memory ran out.", "Lower --max-length.")
    return replace(failed, micro_batch_size=failed.micro_batch_size // 2, num_recomputed=2)


def test_four_plans_give_one_loss_curve_and_one_adapter(load_model, tmp_path: Path):
    runs, weights = {}, {}
    for name, plan in PLANS.items():
        model = load_model()
        runs[name] = Run(model, tmp_path / name, plan=plan, validation=make_samples(6, seed=5)).train()
        weights[name] = lora_weights(model)
    first = runs.pop("one by one")
    reference = weights.pop("one by one")
    assert first.losses[-1] < first.losses[0]
    for name, run in runs.items():
        np.testing.assert_allclose(run.losses, first.losses, rtol=2e-5, err_msg=name)
        np.testing.assert_allclose([loss for _, loss in run.validation], [loss for _, loss in first.validation], 2e-5)
        for key, weight in weights[name].items():
            torch.testing.assert_close(weight, reference[key], rtol=2e-3, atol=2e-5)


def test_a_step_that_runs_out_of_memory_is_done_again_with_the_same_result(load_model, tmp_path: Path, break_passes):
    undisturbed_model, model = load_model(), load_model()
    undisturbed = Run(undisturbed_model, tmp_path / "a", micro=4).train()
    sizes = break_passes(1)  # the second step's only pass
    run = Run(model, tmp_path / "b", micro=4, shrink=halve).train()
    np.testing.assert_allclose(run.losses, undisturbed.losses, rtol=2e-5)
    for key, weight in lora_weights(model).items():
        torch.testing.assert_close(weight, lora_weights(undisturbed_model)[key], rtol=2e-3, atol=2e-5)
    [change] = run.plan_changes
    assert (change.step, change.failed.micro_batch_size, change.plan.micro_batch_size) == (2, 4, 2)
    assert "out of memory" in change.reason
    assert run.trainer.plan == change.plan
    assert (
        len(sizes) == 2 + 2 + 1 + 2
    )  # a step, the failed pass, its two halves, a last step of two samples, a new epoch
    # The blocks of the model do what the new plan says.
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", None) is True]
    assert len(layers) == 2


def test_it_fails_in_the_middle_of_a_step_and_several_times(load_model, tmp_path: Path, break_passes):
    undisturbed = Run(load_model(), tmp_path / "a", micro=4).train()
    break_passes(1, 3)  # second step; then the second half of its repetition
    run = Run(load_model(), tmp_path / "b", micro=4, shrink=halve).train()
    np.testing.assert_allclose(run.losses, undisturbed.losses, rtol=2e-5)
    assert [(change.step, change.plan.micro_batch_size) for change in run.plan_changes] == [(2, 2), (2, 1)]


def test_dropout_falls_alike_when_a_step_is_repeated(load_model, tmp_path: Path, break_passes):
    undisturbed = Run(load_model(dropout=0.2), tmp_path / "a", micro=1).train()
    break_passes(6)
    same = Run(
        load_model(dropout=0.2),
        tmp_path / "b",
        micro=1,
        shrink=lambda plan, free_bytes: replace(plan, num_recomputed=1),
    )
    same.train()
    assert same.losses == undisturbed.losses
    assert len(same.plan_changes) == 1


def test_nothing_smaller_ends_the_run(load_model, tmp_path: Path, break_passes):
    break_passes(*range(2, 40))
    run = Run(load_model(), tmp_path, micro=4, shrink=halve)
    with pytest.raises(DoesNotFitError, match="memory ran out"):
        run.train()
    assert run.trainer.state.global_step == 2
    assert [change.plan.micro_batch_size for change in run.plan_changes] == [2, 1]


def test_without_a_way_to_shrink_the_error_comes_through(load_model, tmp_path: Path, break_passes):
    break_passes(0)
    with pytest.raises(torch.OutOfMemoryError):
        Run(load_model(), tmp_path, micro=4).train()


def test_a_full_host_is_no_reason_for_a_smaller_plan(load_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **_options: object) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(trainer_module, "sum_target_losses", fail)
    run = Run(load_model(), tmp_path, micro=4, shrink=halve)
    with pytest.raises(MemoryError):
        run.train()
    assert run.plan_changes == []


@pytest.mark.parametrize(
    ("error", "is_gpu", "is_any"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True, True),
        (RuntimeError("CUDA driver error: out of memory"), True, True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, True),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), False, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, False),
        (ValueError("out of memory"), False, False),
    ],
    ids=str,
)
def test_what_says_that_memory_ran_out(error: Exception, is_gpu: bool, is_any: bool) -> None:
    assert (is_gpu_out_of_memory(error), is_out_of_memory(error)) == (is_gpu, is_any)


def test_what_pytorch_said_is_told_where_nothing_smaller_is_left(load_model, tmp_path: Path, break_passes):
    break_passes(*range(40))
    with pytest.raises(DoesNotFitError) as error:
        Run(load_model(), tmp_path, micro=4, shrink=halve).train()
    assert "PyTorch said: CUDA out of memory. Tried to allocate 2.00 GiB." in error.value.found
    assert error.value.fix == "Lower --max-length."


def test_other_errors_are_not_taken_for_a_full_memory(load_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **_options: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer_module, "sum_target_losses", fail)
    run = Run(load_model(), tmp_path, micro=4, shrink=halve)
    with pytest.raises(RuntimeError, match="shapes"):
        run.train()
    assert run.plan_changes == []


def test_a_validation_pass_that_runs_out_of_memory_is_split(load_model, tmp_path: Path, break_passes):
    validation = make_samples(8, seed=5)
    plan = replace(make_literal_plan(4), validation_tokens=10**6)
    expected = Run(load_model(), tmp_path / "a", plan=plan, validation=validation).trainer.evaluate()["eval_loss"]
    sizes = break_passes(0, 2, training_only=False)
    run = Run(load_model(), tmp_path / "b", plan=plan, validation=validation)
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert sizes[0] == sum(validation.lengths)
    assert sum(size for index, size in enumerate(sizes) if index not in (0, 2)) == sum(validation.lengths)


def test_a_single_sample_that_does_not_fit_validation_is_an_error(load_model, tmp_path: Path, break_passes):
    break_passes(*range(40), training_only=False)
    with pytest.raises(DoesNotFitError, match="validation sample of"):
        Run(load_model(), tmp_path, micro=4, validation=make_samples(3)).trainer.evaluate()


def test_the_rehearsal_shrinks_the_plan_and_changes_nothing_else(load_model, tmp_path: Path, break_passes):
    undisturbed = Run(load_model(dropout=0.1), tmp_path / "a", micro=1).train()
    sizes = break_passes(0)
    run = Run(
        load_model(dropout=0.1), tmp_path / "b", plan=make_literal_plan(1),
        find_largest=lambda plan: [4] if plan.num_recomputed else [3, 5],
        shrink=lambda plan, free_bytes: replace(plan, num_recomputed=2),
    ).train()  # fmt: skip
    assert run.losses == undisturbed.losses
    assert [change.step for change in run.plan_changes] == [0]
    lengths = make_samples(10).lengths
    assert sizes[:2] == [lengths[3], lengths[4]]  # the smaller plan has a largest micro-batch of its own


def optimizers() -> Iterator[tuple[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]]:
    yield "torch", lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    from bitsandbytes.optim import AdamW32bit

    yield "bitsandbytes", lambda weights: AdamW32bit(weights, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in optimizers()])
def test_state_made_beforehand_changes_no_step(make: Callable[..., torch.optim.Optimizer]):
    def train(reserves: bool) -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8, 128))
        optimizer = make([weight])
        if reserves:
            before = weight.detach().clone()
            weight.grad = torch.zeros_like(weight)
            reserve_optimizer_state(optimizer)
            assert torch.equal(weight, before)
            assert len(optimizer.state) == 1
        for _ in range(3):
            weight.grad = torch.sin(weight.detach())
            optimizer.step()
        return weight.detach()

    assert torch.equal(train(reserves=True), train(reserves=False))


def test_state_that_could_not_be_made_whole_is_made_anew():
    class HalfFull(torch.optim.SGD):
        is_full = True

        def step(self, closure: object = None) -> None:
            for group in self.param_groups:
                for index, weight in enumerate(group["params"]):
                    state = self.state[weight]
                    state["step"] = state.get("step", 0) + 1
                    if self.is_full and index == 1:
                        raise torch.OutOfMemoryError("CUDA out of memory.")

    optimizer = HalfFull([torch.nn.Parameter(torch.zeros(2)) for _ in range(3)], lr=0.1)
    with pytest.raises(torch.OutOfMemoryError):
        reserve_optimizer_state(optimizer)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.is_full = False
    reserve_optimizer_state(optimizer)
    assert [state["step"] for state in optimizer.state.values()] == [0, 0, 0]


def test_state_begins_to_page_with_a_plan_that_says_so_and_never_stops(load_model, monkeypatch: pytest.MonkeyPatch):
    paged: list[object] = []
    monkeypatch.setattr(recovery, "page_optimizer_state", paged.append)
    optimizer = SimpleNamespace(is_paged=None, state={}, param_groups=[])
    changes: list[PlanChange] = []
    runner = PlanRunner(
        lambda _num_blocks: None,
        make_literal_plan(4),
        lambda plan, free: replace(plan, pages_optimizer=True),
        changes.append,
    )
    runner.take_optimizer(optimizer)
    assert optimizer.is_paged is False
    attempts = iter([True, False])

    def work() -> int:
        if next(attempts):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 7

    assert runner.run(work, step=3) == 7
    assert optimizer.is_paged is True
    assert paged == [optimizer]
    assert changes[0].plan.pages_optimizer


def test_a_checkpoint_holds_the_plan_it_was_written_under(load_model, tmp_path: Path, break_passes):
    import json

    break_passes(1)
    run = Run(load_model(), tmp_path, micro=4, shrink=halve).train()
    record = json.loads((run.checkpoints[-1] / PLAN_RECORD).read_text(encoding="utf-8"))
    assert record.pop("uses_engine") is False
    assert ExecutionPlan(**record) == run.trainer.plan == run.plan_changes[0].plan
