"""Optimizer steps of `dsft train` itself, timed: the one file of the bench that knows how the trainer works."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_utils import SaveStrategy

from dsft.bench.figures import MemoryFigures, StepFigures, count_padded
from dsft.bench.kernels import KernelSpan
from dsft.bench.memory import MemoryMeter
from dsft.bench.setup import RowSetup
from dsft.core.models.device import limit_allocator
from dsft.core.models.load import LoraSettings, attach_lora
from dsft.train.arguments import make_arguments
from dsft.train.batches import EffectiveBatch
from dsft.train.blocks import Blocks, take_blocks
from dsft.train.interrupt import InterruptGuard
from dsft.train.reports import StepReport, TrainerHooks
from dsft.train.trainer import QloraTrainer

_PROFILED = torch.profiler.ProfilerActivity.CUDA


@dataclass
class StepClock:
    """Times optimizer steps, each from the end of the one before (data, logging and all) to the end of its kernels.

    Attributes:
        is_gpu: Whether there are kernels to wait for.
        num_warmup_steps: Steps that are run and not kept.
        meter: Looks at the memory after each step.
        on_begin: Told of each step that begins, from 1.
        on_end: Told of each step that has ended.
        step: The step that is running; 0 before the first, in the rehearsal too.
        steps: Steps kept.
        phase_s: Wall time by phase over the steps kept; means something on a CPU alone.
    """

    is_gpu: bool
    num_warmup_steps: int
    meter: MemoryMeter
    on_begin: Callable[[int], None]
    on_end: Callable[[int], None] = lambda _step: None

    def __post_init__(self) -> None:
        self.step = 0
        self.steps: list[StepFigures] = []
        self.phase_s = dict.fromkeys(("data", "forward", "backward", "optimizer and the rest"), 0.0)
        self._now_s = dict(self.phase_s)
        self._last_s = 0.0
        self._padded: list[int] = []

    def begin(self) -> None:
        """A step begins: its batch is not there yet."""
        if self.step == 0:
            self.wait()
            self._last_s = time.perf_counter()
        self.step += 1
        self._padded = []
        self._now_s = dict.fromkeys(self.phase_s, 0.0)
        self.on_begin(self.step)

    def add(self, phase: str, seconds: float) -> None:
        """Count time of the running step."""
        self._now_s[phase] += seconds

    def see_padded(self, num_tokens: int) -> None:
        """Note a micro-batch of so many tokens, padding included."""
        self._padded.append(num_tokens)

    def see_micro_batch(self, _module: object, _args: object, inputs: dict[str, Any]) -> None:
        """Note the micro-batch that a forward pass is about to take; a hook of the model."""
        self.see_padded(count_padded(len(inputs["cu_seq_lens_q"]) - 1, int(inputs["max_length_q"])))

    def end(self, num_tokens: int, num_targets: int) -> None:
        """The step is done and logged."""
        self.wait()
        now_s = time.perf_counter()
        step_s = now_s - self._last_s
        if self.step > self.num_warmup_steps:
            self.steps.append(StepFigures(step_s, num_tokens, num_targets, sum(self._padded), len(self._padded)))
            self._now_s["optimizer and the rest"] = step_s - sum(self._now_s.values())
            for phase, seconds in self._now_s.items():
                self.phase_s[phase] += seconds
        self.meter.sample()
        self.on_end(self.step)
        self._last_s = time.perf_counter()

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.is_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Measurement:
    """What the steps of a row told.

    Attributes:
        steps: The steps, warm-up left out.
        memory: Peak of GPU memory; None on a CPU.
        host_bytes: Largest resident set after a step.
        phase_s: Wall time by phase; on a CPU.
    """

    steps: list[StepFigures]
    memory: MemoryFigures | None
    host_bytes: int
    phase_s: dict[str, float]


def measure_training(base: Any, setup: RowSetup, num_steps: int, clock: StepClock) -> Measurement:
    """Run and time steps of a row.

    Args:
        base: The loaded base model; given back as it was.
        setup: The row.
        num_steps: Steps to keep, after those of the clock's warm-up.
        clock: Times them.
    """
    with _make_trainer(base, setup, clock.num_warmup_steps + num_steps, clock) as trainer:
        trainer.train()
    return Measurement(clock.steps, clock.meter.peak(), clock.meter.host_bytes, clock.phase_s)


def record_kernels(
    base: Any, setup: RowSetup, num_warmup_steps: int, meter: MemoryMeter, on_begin: Callable[[int], None]
) -> tuple[list[KernelSpan], StepFigures]:
    """Run some steps and one more, and return what ran on the GPU in that one.

    Args:
        base: The loaded base model; given back as it was.
        setup: The row.
        num_warmup_steps: Steps before the recorded one.
        meter: Looks at the memory after each step.
        on_begin: Told of each step that begins.

    Returns:
        What ran on the GPU, and the step.
    """
    profiler = torch.profiler.profile(activities=[_PROFILED])
    is_recording = False

    def begin(step: int) -> None:
        nonlocal is_recording
        on_begin(step)
        if step == num_warmup_steps + 1:
            profiler.start()
            is_recording = True

    def stop(_step: int = 0) -> None:
        nonlocal is_recording
        if is_recording:
            is_recording = False
            profiler.stop()

    clock = StepClock(setup.is_gpu, num_warmup_steps, meter, begin, stop)
    try:
        with _make_trainer(base, setup, num_warmup_steps + 1, clock) as trainer:
            trainer.train()
    finally:
        stop()  # PyTorch has one profiler: left on by a step that failed, it would refuse the next row
    results: Any = profiler.profiler
    spans = [
        KernelSpan(event.name(), event.start_ns(), event.end_ns())
        for event in results.kineto_results.events()
        # Beside kernels, copies and fills the GPU's timeline shows the spans that libraries have given names.
        if event.device_type().name == _PROFILED.name and not event.is_user_annotation()
    ]
    return spans, clock.steps[0]


def has_lora(base: Any) -> bool:
    """Return whether parts of LoRA are still attached to a base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in base.modules())


class _TimedTrainer(QloraTrainer):
    """A trainer that tells a clock where it is."""

    clock: StepClock

    def get_batch_samples(
        self, epoch_iterator: Iterator[EffectiveBatch], num_batches: int, device: torch.device
    ) -> tuple[list[EffectiveBatch], None]:
        self.clock.begin()
        started_s = time.perf_counter()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.clock.add("data", time.perf_counter() - started_s)
        return batches

    def training_step(
        self, model: torch.nn.Module, inputs: EffectiveBatch, num_items_in_batch: object = None
    ) -> torch.Tensor:
        started_s = time.perf_counter()
        backward, backward_s = self.accelerator.backward, 0.0

        def timed_backward(*args: Any, **kwargs: Any) -> None:
            nonlocal backward_s
            before_s = time.perf_counter()
            backward(*args, **kwargs)
            backward_s += time.perf_counter() - before_s

        self.accelerator.backward = timed_backward
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.accelerator.backward = backward
            self.clock.add("backward", backward_s)
            self.clock.add("forward", time.perf_counter() - started_s - backward_s)


@contextmanager
def _make_trainer(base: Any, setup: RowSetup, num_steps: int, clock: StepClock) -> Iterator[QloraTrainer]:
    """Attach LoRA, make the trainer as `dsft train` does, and take LoRA off again."""
    config, plan = setup.config, setup.run_plan.plan
    lora = LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, config.seed)
    limit_bytes = setup.run_plan.limit_for(plan)
    model = attach_lora(base, lora)
    hook = base.base_model.register_forward_pre_hook(clock.see_micro_batch, with_kwargs=True)
    blocks: Blocks | None = None
    try:
        blocks = take_blocks(
            model, uses_engine=setup.engine_obstacle is None, attention=setup.attention, precision=setup.precision
        )
        if limit_bytes is not None:
            limit_allocator(limit_bytes)
        with tempfile.TemporaryDirectory(prefix="dsft-bench-") as folder:
            arguments = make_arguments(
                config.model_copy(update={"output_dir": folder}),
                device=setup.device,
                precision=setup.precision,
                optimizer=setup.optimizer,
                num_steps=num_steps,
                has_validation=False,
                validate_first=False,
            )
            arguments.save_strategy = SaveStrategy.NO
            trainer = _TimedTrainer(
                model,
                arguments,
                sequences=setup.data.sequences,
                validation=None,
                effective_batch_size=config.effective_batch_size,
                plan=plan,
                rate_factor=lambda _step: 1.0,
                num_checkpoints_kept=1,
                num_workers=config.dataloader_num_workers,
                # Not entered: Ctrl-C ends a bench at once.
                guard=InterruptGuard(),
                hooks=_make_hooks(clock),
                shrink=None,
                find_largest=setup.order.largest_micro_batch if setup.is_gpu else None,
                blocks=blocks,
            )
            trainer.clock = clock
            yield trainer
    finally:
        hook.remove()
        if blocks is not None:
            blocks.remove()
        model.unload()
        if limit_bytes is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _make_hooks(clock: StepClock) -> TrainerHooks:
    def on_step(report: StepReport) -> None:
        clock.end(report.num_tokens, report.num_targets)

    def ignore(*_report: object) -> None:
        """Take what a bench has no use for: it validates nothing, saves nothing and changes no plan."""

    return TrainerHooks(
        on_step=on_step, on_validation=ignore, on_checkpoint=ignore, on_interrupt=ignore, on_plan_change=ignore
    )
