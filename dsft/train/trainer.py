"""transformers' Trainer with dsft's own training step, validation and checkpoints; knows no files but those."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dsft.core.data.samples import TokenizedDataset
from dsft.core.errors import DoesNotFitError, NonFiniteLossError, is_out_of_memory
from dsft.core.memory.plan import ExecutionPlan
from dsft.train.batches import (
    EffectiveBatch,
    EffectiveBatchLoader,
    MicroBatch,
    SequenceDataset,
    flatten,
    group_by_tokens,
    split_into_micro_batches,
)
from dsft.train.blocks import Blocks, PlainBlocks
from dsft.train.callbacks import Interrupter, Reporter
from dsft.train.checkpoint import find_damage, remove_old_checkpoints, replace_folder, write_checkpoint
from dsft.train.folders import BEST_ADAPTER
from dsft.train.interrupt import InterruptGuard
from dsft.train.loss import sum_target_losses
from dsft.train.optimizer_file import read_optimizer, write_optimizer
from dsft.train.planning import write_plan
from dsft.train.recovery import (
    PlanRunner,
    Shrink,
    get_random_state,
    release_memory,
    reserve_optimizer_state,
    set_random_state,
)
from dsft.train.reports import TrainerHooks, ValidationReport
from dsft.train.restore import TRAINER_STATE, load_adapter_weights, page_optimizer_state

BEST_RECORD = "best.json"

MAX_SKIPPED_STEPS = 24
"""From its first scale, 65,536, float16's loss scaler is at 1 after 16 halvings; more than that is no settling."""


class QloraTrainer(Trainer):
    """Trains LoRA weights on flat micro-batches, a whole effective batch in each step.

    The Trainer is given the whole effective batch as one batch (its own accumulation is 1), because it has no seam to
    regroup micro-batches; they are made in `training_step`.

    Args:
        model: A PEFT model with LoRA attached.
        args: Trainer arguments from `make_arguments`.
        sequences: What is trained on.
        validation: What is held out, or None.
        effective_batch_size: Sequences in an optimizer step.
        plan: How a step is run.
        rate_factor: Gives the learning rate of a step, counted from 0, as a share of its peak.
        num_checkpoints_kept: Older checkpoints are removed.
        num_workers: Processes that load batches.
        guard: Tells whether a signal came.
        hooks: Whom to tell what.
        blocks: The model's blocks; None takes them as they are.
        shrink: Finds the next smaller plan when memory runs out; None lets the error through.
        find_largest: Finds the sequences of the largest micro-batch of the run under a plan, which is tried before the
            first step; None for no rehearsal.
    """

    control: TrainerControl
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        sequences: SequenceDataset,
        validation: TokenizedDataset | None,
        effective_batch_size: int,
        plan: ExecutionPlan,
        rate_factor: Callable[[int], float],
        num_checkpoints_kept: int,
        num_workers: int,
        guard: InterruptGuard,
        hooks: TrainerHooks,
        blocks: Blocks | None = None,
        shrink: Shrink | None = None,
        find_largest: Callable[[ExecutionPlan], Sequence[int]] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=sequences,
            eval_dataset=validation,
            callbacks=[Reporter(self), Interrupter(self)],
        )
        self.remove_callback(PrinterCallback)
        blocks = blocks or PlainBlocks(model)
        self._runner = PlanRunner(blocks.recompute, plan, shrink, hooks.on_plan_change)
        self.lora = blocks.lora
        self._fuses_loss = blocks.fuses_loss
        # The Trainer calls it after each step, which takes 17 ms for 6.7B; `_run_micro_batches` clears them at once.
        model.zero_grad = _leave_gradients
        # Blocks recompute in training mode alone, and come from loading in evaluation mode under a PEFT model that says
        # it is training; see `_begin_training`.
        model.train()
        release_memory()  # attaching LoRA leaves its weights' first forms behind
        self._find_largest = find_largest
        self.hooks = hooks
        self.guard = guard
        self._sequences = sequences
        self._validation = validation
        self._rate_factor = rate_factor
        self._effective_batch_size = effective_batch_size
        self._num_checkpoints_kept = num_checkpoints_kept
        self._num_workers = num_workers
        self._is_interrupt_told = False
        self._num_skipped_steps = 0
        self._num_steps_tried = 0
        self.step_tokens = 0
        self.step_targets = 0
        self.data_wait_s = 0.0

    @property
    def plan(self) -> ExecutionPlan:
        """How a step is run now."""
        return self._runner.plan

    # Batches

    def get_train_dataloader(self) -> EffectiveBatchLoader:
        """Return the loader of effective batches."""
        return EffectiveBatchLoader(
            self._sequences,
            effective_batch_size=self._effective_batch_size,
            seed=self.args.seed,
            num_workers=self._num_workers,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[EffectiveBatch], num_batches: int, device: torch.device
    ) -> tuple[list[EffectiveBatch], None]:
        """Return the next effective batch; targets are counted in `training_step`."""
        started_s = time.perf_counter()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.data_wait_s += time.perf_counter() - started_s
        return batches, None

    def floating_point_ops(self, inputs: EffectiveBatch) -> int:
        """Return 0: dsft reports tokens, and a LoRA step's operations are not what the Trainer counts."""
        return 0

    # The step

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of the one flat tensor; whether its state pages is the plan's business."""
        holder = torch.nn.Module()
        holder.register_parameter("lora", self.lora.parameter)  # a name that decays, as those of LoRA's weights do
        optimizer: torch.optim.Optimizer = super().create_optimizer(holder)
        self._runner.take_optimizer(optimizer)
        return optimizer

    def rehearse(self) -> None:
        """Make the optimizer's state and run the largest micro-batch once, changing nothing.

        What will not fit shows now and not in hours. On a CPU there is nothing to rehearse.
        """
        find_largest = self._find_largest
        if find_largest is None:
            return
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)

        def work() -> None:
            sequences = [self._sequences[index] for index in find_largest(self.plan)]
            self.lora.clear_gradients()
            if not optimizer.state:
                reserve_optimizer_state(optimizer)
            self._begin_training()
            self._run_micro_batches(sequences)

        random_state = get_random_state()
        self._runner.run(work, step=0)
        self.model.zero_grad()
        set_random_state(random_state)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of the learning rate."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self._rate_factor)
        return self.lr_scheduler

    def training_step(
        self, model: torch.nn.Module, inputs: EffectiveBatch, num_items_in_batch: object = None
    ) -> torch.Tensor:
        """Run forward and backward over a whole effective batch.

        The loss is the sum over all target tokens divided by their number in the whole effective batch, so it does
        not depend on how the batch is split. Where memory runs out, the step begins anew under a smaller plan: nothing
        but its own gradients has changed yet.

        Returns:
            The mean loss, float32, shape [], detached.

        Raises:
            NonFiniteLossError: The loss is NaN or infinite, or gradients have been so for many steps; nothing was
                changed.
            DoesNotFitError: Memory ran out and there is no smaller plan.
        """
        self._begin_training()
        self._refuse_endless_overflow()
        self._num_steps_tried += 1
        total = self._runner.run(lambda: self._run_micro_batches(inputs), self.state.global_step + 1)
        if not math.isfinite(total.item()):
            rows = sorted(sample.row for sequence in inputs for sample in sequence)
            raise NonFiniteLossError(
                f"The loss of step {self.state.global_step + 1} is {total.item()}; its samples are the rows "
                f"{', '.join(map(str, rows[:32]))} of the data (counted from 0).",
                "The optimizer was not stepped. Look at those rows, or start anew with --overwrite and a lower "
                "--learning-rate.",
            )
        return total

    def _begin_training(self) -> None:
        if not self.model.training:  # walking through all modules takes 27 ms for 6.7B
            self.model.train()

    def _run_micro_batches(self, sequences: EffectiveBatch) -> torch.Tensor:
        """Run forward and backward over sequences; return their mean loss, and leave the gradients of it."""
        micro_batches = split_into_micro_batches(sequences, self.plan)
        num_targets = sum(batch.num_targets for batch in micro_batches)
        self.step_targets = num_targets
        self.step_tokens = sum(batch.num_tokens for batch in micro_batches)
        self.lora.refresh()
        self.lora.clear_gradients()
        total = torch.zeros((), device=self.args.device)
        for batch in micro_batches:
            self._tell_interrupt()
            with self._autocast():
                loss = sum_target_losses(self.model, batch.to(self.args.device), is_fused=self._fuses_loss) / max(
                    num_targets, 1
                )
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _autocast(self) -> torch.autocast:
        # Without its cache, which would keep a 16-bit copy of all LoRA weights through the forward pass; each of them
        # is used once in it.
        dtype = torch.float16 if self.args.fp16 else torch.bfloat16
        is_on = self.args.fp16 or self.args.bf16
        return torch.autocast(self.args.device.type, dtype, enabled=is_on, cache_enabled=False)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' Trainer.

        Raises:
            NonFiniteLossError: As `training_step`, or no step of a float16 run was taken.
        """
        output = super().train(*args, **kwargs)
        if self.state.global_step == self._num_steps_tried:  # a resumed run has taken steps before
            self._refuse_endless_overflow(most=min(MAX_SKIPPED_STEPS, self._num_steps_tried - 1))
        return output

    def _refuse_endless_overflow(self, most: int = MAX_SKIPPED_STEPS) -> None:
        if not self.args.fp16:
            return
        self._num_skipped_steps = self._num_skipped_steps + 1 if self.accelerator.optimizer_step_was_skipped else 0
        if self._num_skipped_steps > most:
            raise NonFiniteLossError(
                f"The gradients of {self._num_skipped_steps} steps in a row are too large for float16; the last of "
                f"them is step {self.state.global_step}.",
                "Start anew with --overwrite and --precision fp32, or bf16 on a GPU that has it.",
            )

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        norm: torch.Tensor = self.accelerator.clip_grad_norm_([self.lora.parameter], self.args.max_grad_norm)
        # With fp16 an infinite norm is the loss scaler's business: it skips the step and lowers its scale.
        if not self.args.fp16 and not torch.isfinite(norm):
            raise NonFiniteLossError(
                f"A gradient of step {self.state.global_step + 1} is {norm.item()}.",
                "The optimizer was not stepped. Start anew with --overwrite and a lower --learning-rate.",
            )
        return norm

    # Validation

    def evaluate(self, *_args: object, **_kwargs: object) -> dict[str, float]:
        """Measure the validation loss in passes no larger than a training micro-batch; no logits are kept.

        Returns:
            {"eval_loss": mean cross-entropy over all targets}, or {} if a signal ended the pass early.
        """
        if self._validation is None:
            raise ValueError("there is no validation data")
        started_s = time.perf_counter()
        self.model.eval()
        self.lora.refresh()
        total = torch.zeros((), device=self.args.device, dtype=torch.float64)
        num_targets = 0
        groups = group_by_tokens(self._validation.lengths, self.plan.validation_tokens)
        while groups:
            if self._tell_interrupt():
                self.control.should_evaluate = False
                self.control.should_save = True
                self.control.should_training_stop = True
                return {}
            group = groups.pop(0)
            batch = flatten([self._validation[int(index)] for index in group])
            part = self._validate(batch)
            if part is None:  # out of memory: in two halves
                groups[:0] = [half for half in np.array_split(group, 2) if len(half)]
                continue
            total += part
            num_targets += batch.num_targets
        loss = total.item() / max(num_targets, 1)
        is_best = math.isfinite(loss) and (self.state.best_metric is None or loss < self.state.best_metric)
        if is_best:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            replace_folder(Path(self.args.output_dir) / BEST_ADAPTER, self._write_best_adapter)
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.hooks.on_validation(
            ValidationReport(self.state.global_step, loss, num_targets, is_best, time.perf_counter() - started_s)
        )
        return metrics

    def _validate(self, batch: MicroBatch) -> torch.Tensor | None:
        """Return the summed loss of a pass, or None where it ran out of GPU memory and can be made smaller.

        Raises:
            DoesNotFitError: It is a single sample.
        """
        try:
            with torch.no_grad(), self._autocast():
                return sum_target_losses(self.model, batch.to(self.args.device), is_fused=self._fuses_loss).double()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(batch.sample_bounds) <= 2:
                raise DoesNotFitError(
                    f"A validation sample of {batch.num_tokens} tokens does not fit the memory.",
                    "Lower --max-length, or hold out other samples with --validation-dataset.",
                ) from error
        release_memory()
        return None

    # Checkpoints

    def save_adapter(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors; needs no GPU memory."""
        # PEFT would copy what shares memory, on the GPU.
        weights = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        # Without save_embedding_layers=False PEFT asks the hub whether the vocabulary was resized.
        self.model.save_pretrained(
            str(folder), state_dict=weights, safe_serialization=True, save_embedding_layers=False
        )
        # PEFT writes a card of its own; dsft's stands with the final adapter.
        (folder / "README.md").unlink(missing_ok=True)

    def _write_best_adapter(self, folder: Path) -> None:
        self.save_adapter(folder)
        best = {"step": self.state.best_global_step, "validation_loss": self.state.best_metric}
        (folder / BEST_RECORD).write_text(json.dumps(best), encoding="utf-8")

    def adopt_best_on_disk(self) -> None:
        """Take the best validation loss from the adapter that is on disk.

        A run killed after a validation and before its checkpoint has a newer best adapter than its checkpoint says.
        """
        folder = Path(self.args.output_dir) / BEST_ADAPTER
        best = {"step": None, "validation_loss": None}
        if find_damage(folder) is None:
            best = json.loads((folder / BEST_RECORD).read_text(encoding="utf-8"))
        self.state.best_global_step, self.state.best_metric = best["step"], best["validation_loss"]

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        folder = Path(self.args.output_dir)
        step = self.state.global_step
        path = write_checkpoint(folder, step, self._write_checkpoint_files)
        remove_old_checkpoints(folder, self._num_checkpoints_kept)
        self.hooks.on_checkpoint(step, path)

    def _write_checkpoint_files(self, folder: Path) -> None:
        self.save_adapter(folder)
        write_optimizer(folder, self.optimizer, self.lr_scheduler, self.lora, self._trained_weights)
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE))
        write_plan(self.plan, folder, uses_engine=self._fuses_loss)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_adapter_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        read_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler, self.lora, self._trained_weights)
        page_optimizer_state(getattr(self.optimizer, "optimizer", self.optimizer))
        release_memory()

    @property
    def _trained_weights(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _tell_interrupt(self) -> bool:
        if self.guard.signal_name is not None and not self._is_interrupt_told:
            self._is_interrupt_told = True
            self.hooks.on_interrupt(self.guard.signal_name)
        return self.guard.signal_name is not None


def _leave_gradients(*_args: object, **_kwargs: object) -> None:
    """Do nothing: the gradients are cleared before they are computed anew."""
