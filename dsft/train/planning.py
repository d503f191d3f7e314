"""The execution plan of a run: made before the model loads, shrunk when memory runs out, kept by a resumed run."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dsft.core.config.schema import TrainConfig
from dsft.core.errors import DoesNotFitError
from dsft.core.gpu import GpuMemoryReader, open_gpu_memory
from dsft.core.memory.cards import KERNELS_BYTES, Card, card_of_device, card_of_memory
from dsft.core.memory.explain import describe_lack, explain_plan
from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.plan import (
    ExecutionPlan,
    Fixed,
    Job,
    Workload,
    assess,
    choose_plan,
    choose_smaller_plan,
    needed_bytes,
    predict_memory,
)
from dsft.core.memory.remedies import find_remedies, least_budget_bytes, list_remedies
from dsft.core.memory.settings import can_page, fix_settings, take_literally
from dsft.core.memory.training import TrainingMemory
from dsft.core.models.attention import PER_SAMPLE, AttentionKernel
from dsft.core.models.device import Device, Precision, can_oversubscribe, open_context, read_device_memory
from dsft.core.units import GIB, format_gib

PLAN_RECORD = "plan.json"


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run and what it was made from.

    Attributes:
        plan: The plan.
        num_blocks: Blocks of the model.
        job: What it was made for; None on a CPU, where memory is not planned.
        fixed: What the user decided about it.
        is_literal: Whether the settings are taken as they are written.
        gpu_memory: Reads the GPU's memory; None on a CPU, and where NVML does not speak of this device.
        is_limited: Whether the run is held to its budget, and not only planned for it.
    """

    plan: ExecutionPlan
    num_blocks: int
    job: Job | None = None
    fixed: Fixed = field(default_factory=Fixed)
    is_literal: bool = False
    gpu_memory: GpuMemoryReader | None = None
    is_limited: bool = False

    def explain(self, config: TrainConfig) -> str:
        """Say what the plan is, against the settings as they are written."""
        if self.job is None:
            return "the settings as written"
        as_written = config.model_copy(update={"micro_batch": None, "recompute_blocks": None, "page_optimizer": "auto"})
        literal = take_literally(as_written, self.job.workload, self.num_blocks)
        return explain_plan(self.job, assess(self.job, self.plan), assess(self.job, literal))

    def predict(self, num_tokens: int, num_targets: int, plan: ExecutionPlan) -> TrainingMemory | None:
        """Return the memory with a largest micro-batch that is known; None on a CPU."""
        return predict_memory(self.job, plan, num_tokens, num_targets) if self.job is not None else None

    def limit_for(self, plan: ExecutionPlan) -> int | None:
        """Return what PyTorch's allocator is held to under a plan: the budget less what is beside it."""
        if self.job is None or not self.is_limited:
            return None
        memory = assess(self.job, plan).memory
        # On a card that is full, state that pages gives way to what PyTorch takes.
        paged = 0 if self.job.is_card_full else memory.paged_bytes
        return self.job.budget_bytes - memory.context_bytes - paged

    def shrink(self, failed: ExecutionPlan, free_bytes: int) -> ExecutionPlan:
        """Return the next smaller plan.

        Args:
            failed: The plan that ran out of memory.
            free_bytes: What a step could have now, beyond what stays from step to step.

        Raises:
            DoesNotFitError: There is nothing smaller, or the plan is off.
        """
        smaller = None
        if self.job is not None and not self.is_literal:
            smaller = choose_smaller_plan(self.job, failed, free_bytes, self.fixed)
        if smaller is None:
            raise self.does_not_fit("The GPU's memory ran out", failed)
        return smaller.plan

    def does_not_fit(self, what: str, plan: ExecutionPlan) -> DoesNotFitError:
        """Return the error that says so, with what would help."""
        if self.job is None:
            return DoesNotFitError(f"{what}.", "Lower --max-length or --lora-r.")
        job = self.job
        need, room = needed_bytes(job, assess(job, plan).memory), job.allowed_bytes
        if need > room:
            needed, lacking, has = describe_lack(need, room)
            found = f"{what}: the run needs {needed}, {lacking} more than the {has} that it may take."
        else:
            found = f"{what}: the run was predicted to need {format_gib(need)} of {format_gib(room)}."
        ways = []
        if self.is_literal and choose_plan(job).fits:
            ways.append("--plan auto, which finds a plan that fits")
        remedies = list_remedies(find_remedies(job, self.fixed))
        if remedies:
            ways.append(remedies)
        is_held = job.budget_bytes < job.card.usable_bytes
        least = least_budget_bytes(job, self.fixed)
        if is_held and least <= job.card.usable_bytes:
            ways.append("a higher --vram")
        elif least > job.budget_bytes:
            ways.append(f"a GPU with {format_gib(least)} free")
        # What is predicted to fit and does not: something else has taken the memory.
        if not is_held and (need <= room or job.card.driver_bytes > GIB):
            ways.append("closing other programs that use the GPU")
        return DoesNotFitError(found, f"Enough would be {', or '.join(ways)}.")


@dataclass(frozen=True)
class CardView:
    """A GPU as it was before this process took anything of it.

    Attributes:
        card: Its record; `driver_bytes` is what was in use.
        reader: Reads its memory; None without NVML.
        context_bytes: What a CUDA context takes, kernels included; None where it could not be seen.
    """

    card: Card
    reader: GpuMemoryReader | None
    context_bytes: int | None


def look_at_card(device: Device) -> CardView | None:
    """Look at the GPU, and make this process's CUDA context to see what it takes; None on a CPU."""
    if device.kind == "cpu" or device.total_bytes is None or device.capability is None:
        return None
    card = card_of_device(device.name, device.total_bytes, device.capability, device.multiprocessors or 1)
    reader = open_gpu_memory(device.uuid) if device.uuid is not None else None
    before = reader.read() if reader is not None else None
    open_context()
    # NVML may be missing, or speak of the whole card where this is a part of it (MIG).
    if reader is None or before is None or before.total_bytes > 1.1 * device.total_bytes:
        free, total = read_device_memory()
        used_before = max(0, total - free - card.context_bytes + KERNELS_BYTES)
        return CardView(replace(card, total_bytes=total, driver_bytes=used_before), None, None)
    bare = reader.read().used_bytes - before.used_bytes
    # Another process that came or went in between would be taken for the context.
    is_plausible = card.context_bytes // 4 < bare < 2 * card.context_bytes
    seen = replace(card, total_bytes=before.total_bytes, driver_bytes=before.used_bytes)
    return CardView(seen, reader, bare + KERNELS_BYTES if is_plausible else None)


def plan_run(
    config: TrainConfig,
    view: CardView | None,
    *,
    precision: Precision,
    attention: AttentionKernel,
    shape: ModelShape,
    workload: Workload,
    uses_engine: bool = False,
) -> RunPlan:
    """Make the plan of a run, and refuse one that can't fit.

    Args:
        config: The settings.
        view: The GPU; None on a CPU, where settings are taken as they are written.
        precision: Compute type.
        attention: Attention kernel.
        shape: The model.
        workload: What the optimizer steps consist of.
        uses_engine: Whether dsft's engine computes the blocks.

    Raises:
        DoesNotFitError: Not even the smallest plan fits the memory that is free.
    """
    fixed = fix_settings(config, shape.num_blocks)
    literal = take_literally(config, workload, shape.num_blocks)
    if view is None:
        return RunPlan(replace(literal, pages_optimizer=False), shape.num_blocks, fixed=fixed, is_literal=True)
    free = view.card.usable_bytes
    budget = free if config.vram is None else min(free, card_of_memory(config.vram).usable_bytes)
    job = Job(
        shape=shape,
        rank=config.lora_r,
        workload=workload,
        card=view.card,
        budget_bytes=budget,
        value_bytes=4 if precision == "fp32" else 2,
        is_flash=attention.name != PER_SAMPLE,
        has_dropout=config.lora_dropout > 0,
        can_page=can_page(config),
        is_card_full=budget == free and can_oversubscribe(),
        context_bytes=view.context_bytes,
        uses_engine=uses_engine,
    )
    planned = assess(job, literal) if config.plan == "off" else choose_plan(job, fixed)
    run_plan = RunPlan(
        planned.plan,
        shape.num_blocks,
        job,
        fixed,
        is_literal=config.plan == "off",
        gpu_memory=view.reader,
        is_limited=config.vram is not None,
    )
    if not planned.fits:
        raise run_plan.does_not_fit("There is not enough GPU memory", planned.plan)
    return run_plan


def keep_checkpoint_plan(run_plan: RunPlan, checkpoint: Path) -> tuple[RunPlan, str | None]:
    """Return the run's plan with the one its checkpoint was written under, if that still fits, and a notice if not.

    A plan the user decides anew (by --plan off, --micro-batch and the like) is not overruled by a checkpoint.
    """
    path = checkpoint / PLAN_RECORD
    if run_plan.job is None or run_plan.is_literal or not path.exists():
        return run_plan, None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_for_these_blocks = record.pop("uses_engine", False) == run_plan.job.uses_engine
        kept = ExecutionPlan(**record)
    except (AttributeError, TypeError, ValueError):
        return run_plan, "The checkpoint's plan is of another version of dsft and is made anew."
    if not is_for_these_blocks:
        return run_plan, None
    if not kept.splits_by_tokens:  # of a run with --plan off, which this one is not
        return run_plan, None
    fixed = run_plan.fixed
    decided = (
        (fixed.micro_batch_size, kept.micro_batch_size),
        (fixed.num_recomputed, kept.num_recomputed),
        (fixed.pages_optimizer, kept.pages_optimizer),
    )
    if kept == run_plan.plan or any(now is not None and now != then for now, then in decided):
        return run_plan, None
    planned = assess(run_plan.job, kept)
    if not planned.fits:
        needs = format_gib(needed_bytes(run_plan.job, planned.memory))
        has = format_gib(run_plan.job.allowed_bytes)
        return run_plan, f"The checkpoint's plan needs {needs} of now {has}; a smaller one takes its place."
    return replace(run_plan, plan=kept), None


def write_plan(plan: ExecutionPlan, folder: Path, *, uses_engine: bool) -> None:
    """Write a plan into a checkpoint, and for whose blocks it was made."""
    record = asdict(plan) | {"uses_engine": uses_engine}
    (folder / PLAN_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
