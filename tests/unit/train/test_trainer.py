"""The training step, validation and resume of QloraTrainer, on a random Llama with NF4 weights."""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dsft.core.config.schema import TrainConfig
from dsft.core.data.samples import Sample
from dsft.core.engine.flat_lora import FlatLora
from dsft.core.errors import CheckpointError, NonFiniteLossError
from dsft.core.memory.plan import ExecutionPlan
from dsft.core.models.device import Device
from dsft.train.arguments import choose_optimizer, make_arguments
from dsft.train.batches import SequenceDataset, flatten
from dsft.train.blocks import PlainBlocks
from dsft.train.checkpoint import find_damage, list_checkpoints
from dsft.train.interrupt import InterruptGuard
from dsft.train.loss import sum_target_losses
from dsft.train.recovery import PlanChange
from dsft.train.reports import TrainerHooks
from dsft.train.restore import load_adapter_weights
from dsft.train.schedule import learning_rate_factor
from dsft.train.trainer import MAX_SKIPPED_STEPS, QloraTrainer
from tests.unit.train.random_samples import ListDataset, make_samples

CPU = Device("cpu", "CPU")


def make_literal_plan(micro: int, num_recomputed: int = 0) -> ExecutionPlan:
    return ExecutionPlan(
        micro_batch_size=micro,
        micro_batch_tokens=10**6,
        splits_by_tokens=False,
        num_recomputed=num_recomputed,
        pages_optimizer=False,
        validation_tokens=50,
    )


class Run:
    """A trainer and what it told."""

    def __init__(self, model, folder: Path, *, micro: int = 1, steps: int = 4, save_steps: int = 2, **options):
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.checkpoints: list[Path] = []
        self.plan_changes: list[PlanChange] = []
        self.guard = InterruptGuard()
        self.on_step = options.pop("on_step", lambda report: None)
        config = TrainConfig(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=save_steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=4 // micro,
            learning_rate=1e-2,
        )
        samples = options.pop("samples", make_samples(10))
        validation = options.pop("validation", None)
        self.trainer = QloraTrainer(
            model,
            make_arguments(
                config,
                device=CPU,
                precision="fp32",
                optimizer=choose_optimizer(config, CPU),
                num_steps=steps,
                has_validation=validation is not None,
                validate_first=True,
            ),
            sequences=SequenceDataset(samples),
            validation=validation,
            effective_batch_size=4,
            plan=options.pop("plan", None) or make_literal_plan(micro),
            rate_factor=lambda step: learning_rate_factor(step, num_warmup_steps=1, num_steps=steps, shape="cosine"),
            num_checkpoints_kept=2,
            num_workers=0,
            guard=self.guard,
            hooks=TrainerHooks(
                self._take_step,
                lambda report: self.validation.append((report.step, report.loss)),
                lambda step, path: self.checkpoints.append(path),
                lambda name: None,
                self.plan_changes.append,
            ),
            **options,
        )

    def _take_step(self, report) -> None:
        self.losses.append(report.loss)
        self.on_step(report)

    def train(self, resume: Path | None = None) -> "Run":
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return self


def lora_weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses_of_each_target(model, samples) -> list[torch.Tensor]:
    """The plain way: each sample alone through the model, all logits."""
    results = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)[None]
        bounds = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
        logits = model(input_ids=ids, cu_seq_lens_q=bounds, use_cache=False).logits[0]
        labels = torch.where(torch.from_numpy(sample.is_target), ids[0], -100)
        results.append(cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="none")[labels[1:] != -100])
    return results


def test_only_lora_weights_train_and_they_are_float32(load_model):
    model = load_model()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_loss_of_a_flat_batch_is_the_sum_of_its_samples_alone(load_model):
    model = load_model().eval()
    samples = [make_samples(6)[i] for i in range(6)]
    with torch.no_grad():
        flat = sum_target_losses(model, flatten(samples))
        alone = torch.cat(losses_of_each_target(model, samples))
    torch.testing.assert_close(flat, alone.sum(), rtol=1e-5, atol=0)


def test_a_sample_does_not_feel_the_others_in_its_batch(load_model):
    """Bit for bit: changing every token of the middle sample leaves the logits of the others as they were."""
    model = load_model().eval()
    data = make_samples(3)
    first, middle, last = data[0], data[1], data[2]
    other = Sample((middle.token_ids + 1) % 128, middle.is_target, 1)

    def logits(samples):
        batch = flatten(samples)
        with torch.no_grad():
            return model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, cu_seq_lens_q=batch.sample_bounds
            ).logits[0]

    before, after = logits([first, middle, last]), logits([first, other, last])
    start, end = len(first.token_ids), len(first.token_ids) + len(middle.token_ids)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])


def test_losses_and_weights_do_not_depend_on_the_micro_batch(load_model, tmp_path: Path):
    results = {}
    for micro in (1, 2, 4):
        model = load_model()
        run = Run(model, tmp_path / str(micro), micro=micro).train()
        results[micro] = (run.losses, lora_weights(model))
    for micro in (2, 4):
        np.testing.assert_allclose(results[micro][0], results[1][0], rtol=2e-5)
        for name, weight in results[1][1].items():
            torch.testing.assert_close(results[micro][1][name], weight, rtol=1e-3, atol=2e-5)


def test_the_step_loss_is_the_mean_over_all_targets_of_the_effective_batch(load_model, tmp_path: Path):
    model = load_model()
    samples = make_samples(4)
    with torch.no_grad():
        expected = torch.cat(losses_of_each_target(model.eval(), [samples[i] for i in range(4)])).mean().item()
    run = Run(model, tmp_path, steps=1, samples=samples).train()
    assert run.losses[0] == pytest.approx(expected, rel=1e-5)


def test_a_run_repeats_bit_for_bit(load_model, tmp_path: Path):
    first, second = (Run(load_model(dropout=0.1), tmp_path / name).train() for name in "ab")
    assert first.losses == second.losses


@pytest.mark.parametrize("resume_from", [2, 3])
def test_a_resumed_run_goes_on_bit_for_bit(load_model, tmp_path: Path, resume_from: int):
    """With dropout, so that the random state counts too; 10 samples in batches of 4 make epochs of 3 steps."""
    whole_model = load_model(dropout=0.1)
    whole = Run(whole_model, tmp_path / "whole", steps=7, save_steps=resume_from).train()
    stopped = Run(load_model(dropout=0.1), tmp_path / "stopped", steps=7, save_steps=resume_from)

    def stop(report):
        if report.step == resume_from:
            stopped.guard.signal_name = "SIGTERM"

    stopped.on_step = stop
    stopped.train()
    checkpoint = list_checkpoints(tmp_path / "stopped")[0]
    # on_step is told after the step's end, so the stop takes effect at the next one
    done = int(checkpoint.name.rpartition("-")[2])
    assert done == resume_from + 1
    model = load_model(dropout=0.1)
    resumed = Run(model, tmp_path / "stopped", steps=7, save_steps=resume_from).train(checkpoint)
    assert stopped.losses + resumed.losses == whole.losses
    for name, weight in lora_weights(whole_model).items():
        assert torch.equal(lora_weights(model)[name], weight)


def test_a_resumed_run_saves_and_validates_at_the_intervals_it_is_given(load_model, tmp_path: Path):
    validation = make_samples(5, seed=9)
    Run(load_model(), tmp_path, steps=2, save_steps=2, validation=validation).train()
    resumed = Run(load_model(), tmp_path, steps=7, save_steps=3, validation=validation).train(tmp_path / "checkpoint-2")
    assert [path.name for path in resumed.checkpoints] == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    assert [step for step, _ in resumed.validation] == [2, 3, 6, 7]  # the first asked for here, the last by its end


def test_checkpoints_are_sealed_and_the_last_two_are_kept(load_model, tmp_path: Path):
    run = Run(load_model(), tmp_path, steps=6, save_steps=2).train()
    assert [path.name for path in run.checkpoints] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    kept = list_checkpoints(tmp_path)
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-4"]
    assert all(find_damage(path) is None for path in kept)
    assert not list(tmp_path.rglob("training_args.bin"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-4"}


def test_validation_is_the_mean_over_all_targets_and_keeps_the_best(load_model, tmp_path: Path):
    validation = make_samples(5, seed=9)
    model = load_model()
    with torch.no_grad():
        expected = torch.cat(losses_of_each_target(model.eval(), [validation[i] for i in range(5)])).mean().item()
    run = Run(model, tmp_path, validation=validation).train()
    assert [step for step, _ in run.validation] == [0, 2, 4]
    assert run.validation[0][1] == pytest.approx(expected, rel=1e-5)
    best_step, best_loss = min(run.validation, key=lambda point: point[1])
    assert (run.trainer.state.best_global_step, run.trainer.state.best_metric) == (best_step, best_loss)
    fresh = load_model()
    load_adapter_weights(fresh, tmp_path / "adapter-best")
    with torch.no_grad():
        loss = torch.cat(losses_of_each_target(fresh.eval(), [validation[i] for i in range(5)])).mean().item()
    assert loss == pytest.approx(best_loss, rel=1e-5)


def test_a_signal_during_validation_saves_once_and_leaves_the_pass_to_the_resumed_run(load_model, tmp_path: Path):
    run = Run(load_model(), tmp_path, validation=make_samples(5, seed=9), save_steps=2)
    run.trainer.hooks = replace(run.trainer.hooks, on_step=lambda report: None)
    evaluate = run.trainer.evaluate

    def interrupted_evaluate(*args, **kwargs):
        if run.trainer.state.global_step == 2:
            run.guard.signal_name = "SIGTERM"
        return evaluate(*args, **kwargs)

    run.trainer.evaluate = interrupted_evaluate
    run.train()
    assert [step for step, _ in run.validation] == [0]
    assert run.checkpoints == [tmp_path / "checkpoint-2"]
    assert run.trainer.state.global_step == 2


def test_a_validation_loss_that_is_not_finite_is_never_the_best(load_model, tmp_path: Path):
    run = Run(load_model(), tmp_path, validation=make_samples(5, seed=9))
    norm = next(p for p in run.trainer.model.parameters() if not p.requires_grad and p.dtype == torch.float32)
    healthy = norm.data.clone()
    norm.data.fill_(float("nan"))
    assert np.isnan(run.trainer.evaluate()["eval_loss"])
    assert run.trainer.state.best_metric is None
    assert not (tmp_path / "adapter-best").exists()
    norm.data.copy_(healthy)
    assert run.trainer.evaluate()["eval_loss"] == run.trainer.state.best_metric


def test_a_damaged_best_adapter_is_not_adopted(load_model, tmp_path: Path):
    run = Run(load_model(), tmp_path, validation=make_samples(5, seed=9)).train()
    best = run.trainer.state.best_metric
    run.trainer.adopt_best_on_disk()
    assert run.trainer.state.best_metric == best
    (tmp_path / "adapter-best" / "adapter_model.safetensors").write_bytes(b"")
    run.trainer.adopt_best_on_disk()
    assert run.trainer.state.best_metric is None


def test_gradients_that_overflow_without_end_stop_a_float16_run(load_model, tmp_path: Path):
    run = Run(load_model(), tmp_path)
    run.trainer.args.fp16 = True
    run.trainer.accelerator = SimpleNamespace(optimizer_step_was_skipped=True)
    for _ in range(MAX_SKIPPED_STEPS):
        run.trainer._refuse_endless_overflow()
    with pytest.raises(NonFiniteLossError, match="too large for float16"):
        run.trainer._refuse_endless_overflow()


@pytest.mark.parametrize(("skipped", "is_refused"), [(2, True), (1, False)])
def test_a_short_float16_run_that_took_no_step_is_refused(
    load_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: int, is_refused: bool
):
    run = Run(load_model(), tmp_path, steps=2)
    run.trainer.args.fp16 = True
    was_skipped = lambda _: run.trainer.state.global_step > 2 - skipped  # noqa: E731
    monkeypatch.setattr(type(run.trainer.accelerator), "optimizer_step_was_skipped", property(was_skipped))
    with pytest.raises(NonFiniteLossError, match="2 steps in a row") if is_refused else nullcontext():
        run.train()


def test_a_run_of_one_step_learns(load_model, tmp_path: Path):
    model = load_model()
    before = lora_weights(model)
    Run(model, tmp_path, steps=1).train()
    assert not any(torch.equal(before[name], weight) for name, weight in lora_weights(model).items())


def test_a_validation_pass_leaves_the_gradients_alone(load_model, tmp_path: Path):
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights in evaluation mode, and gradients then go missing."""
    data = make_samples(4)

    def gradients(validate_first: bool) -> list[torch.Tensor]:
        model = load_model()
        run = Run(model, tmp_path / str(validate_first), validation=make_samples(3, seed=5))
        if validate_first:
            run.trainer.evaluate()
        run.trainer.create_optimizer()
        run.trainer.training_step(model, [[data[i]] for i in range(4)])
        return [p.grad for p in model.parameters() if p.requires_grad]

    for before, after in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(before, after)
        assert before.abs().max() > 0


def test_weights_and_gradients_stay_in_one_piece(load_model, tmp_path: Path):
    """Through training, checkpoints and the way back: what the optimizer steps is what the model computes with."""

    def assert_is_one_piece(run: Run, model) -> None:
        pointer = run.trainer.lora.parameter.untyped_storage().data_ptr()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.untyped_storage().data_ptr() == pointer for p in trained)
        assert [id(p) for p in run.trainer.lora.parts] == [id(p) for p in trained]

    model = load_model()
    run = Run(model, tmp_path, steps=3, validation=make_samples(5, seed=9)).train()
    assert_is_one_piece(run, model)
    resumed_model = load_model()
    resumed = Run(resumed_model, tmp_path, steps=3).train(tmp_path / "checkpoint-2")
    assert_is_one_piece(resumed, resumed_model)
    assert resumed.losses == run.losses[2:]
    assert torch.equal(resumed.trainer.lora.parameter, run.trainer.lora.parameter)


def test_a_given_piece_s_copy_is_fresh_in_every_pass(load_model, tmp_path: Path):
    model = load_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = PlainBlocks(model)
    blocks.lora = lora = FlatLora([trained[1::2], trained[::2]], torch.bfloat16)  # in an order of its own
    run = Run(model, tmp_path, steps=3, validation=make_samples(5, seed=9), blocks=blocks)
    copies: list[torch.Tensor] = []

    def look(*_: object) -> None:
        assert torch.equal(lora.copy, lora.parameter.bfloat16())
        copies.append(lora.copy.clone())

    model.get_base_model().base_model.register_forward_pre_hook(look)
    run.train()
    assert run.trainer.lora is lora
    assert len(run.validation) == 3
    num_steps_seen = 1 + sum(not torch.equal(before, after) for before, after in itertools.pairwise(copies))
    assert num_steps_seen == 4  # before each of three steps, and in the validation after the last
    plain = Run(load_model(), tmp_path / "plain", steps=3).train()
    np.testing.assert_allclose(run.losses, plain.losses, rtol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(load_model, tmp_path: Path):
    model = load_model()
    before = lora_weights(model)
    run = Run(model, tmp_path, samples=make_samples(4))
    next(p for p in model.parameters() if not p.requires_grad and p.dtype == torch.float32).data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"step 1 is nan.*rows 0, 1, 2, 3"):
        run.train()
    assert all(torch.equal(before[name], weight) for name, weight in lora_weights(model).items())
    assert not list_checkpoints(tmp_path)


def test_an_adapter_with_a_missing_tensor_is_refused(load_model, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model = load_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        load_adapter_weights(load_model(), tmp_path)


def test_empty_targets_in_a_batch_change_nothing(load_model, tmp_path: Path):
    """A sample without targets adds nothing to the loss and nothing to its normalisation."""
    samples = make_samples(3)
    silent = Sample(np.arange(9), np.zeros(9, dtype=bool), 3)
    with_silent = Run(load_model(), tmp_path / "a", steps=1, samples=ListDataset([*samples, silent])).train()
    without = Run(load_model(), tmp_path / "b", steps=1, samples=samples).train()
    assert with_silent.losses[0] == pytest.approx(without.losses[0], rel=1e-5)


@pytest.mark.parametrize("is_planned", [False, True])
def test_blocks_recompute_in_a_run_without_validation_too(
    load_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_planned: bool
):
    """From loading, blocks are in evaluation mode, in which transformers' modules keep their activations."""
    calls: list[int] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def count(*args, **kwargs):
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", count)
    model = load_model().eval()
    model.training = True  # as PEFT's outer module says after loading
    plan = replace(make_literal_plan(4), num_recomputed=2 if is_planned else 0)
    Run(model, tmp_path, micro=4, steps=1, plan=plan).train()
    assert bool(calls) is is_planned
