"""The card as it was before the bench took anything of it, and the plan each row gets on it.

`dsft.train.planning` looks at the card for each plan; a bench makes many in one process that has a context already.
"""

from dataclasses import dataclass, replace

from dsft.core.config.schema import TrainConfig
from dsft.core.errors import DoesNotFitError
from dsft.core.gpu import GpuMemoryReader, open_gpu_memory
from dsft.core.memory.cards import KERNELS_BYTES, Card, card_of_device, card_of_memory
from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.plan import Fixed, Job, Workload, assess, choose_plan, make_plan
from dsft.core.models.attention import PER_SAMPLE, AttentionKernel
from dsft.core.models.device import Device, Precision, open_context
from dsft.core.units import format_gib
from dsft.train.planning import RunPlan


@dataclass(frozen=True)
class CardView:
    """A GPU as the bench found it.

    Attributes:
        card: Its record; `driver_bytes` is what was in use before.
        reader: Reads its memory; None without NVML.
        context_bytes: What a CUDA context was seen to take; None where it could not be seen.
    """

    card: Card
    reader: GpuMemoryReader | None
    context_bytes: int | None


def look_at_card(device: Device) -> CardView | None:
    """Look at the GPU, and make this process's CUDA context; None on a CPU."""
    if device.kind == "cpu" or device.total_bytes is None or device.capability is None:
        return None
    card = card_of_device(device.name, device.total_bytes, device.capability, device.multiprocessors or 1)
    reader = open_gpu_memory(device.uuid) if device.uuid is not None else None
    if reader is None:
        open_context()
        return CardView(card, None, None)
    before = reader.read()
    open_context()
    bare = reader.read().used_bytes - before.used_bytes
    # Another process that came or went in between would be taken for the context.
    is_plausible = card.context_bytes // 4 < bare < 2 * card.context_bytes
    seen = replace(card, total_bytes=before.total_bytes, driver_bytes=before.used_bytes)
    return CardView(seen, reader, bare + KERNELS_BYTES if is_plausible else None)


def plan_row(
    config: TrainConfig,
    view: CardView | None,
    *,
    precision: Precision,
    attention: AttentionKernel,
    shape: ModelShape,
    workload: Workload,
) -> RunPlan:
    """Make the plan of a row.

    Raises:
        DoesNotFitError: The plan, or with `plan: auto` every plan, needs more than there is.
    """
    literal_size = min(config.micro_batch or config.per_device_train_batch_size, config.effective_batch_size)
    recomputed = shape.num_blocks if config.gradient_checkpointing else 0
    if config.recompute_blocks is not None:
        recomputed = min(config.recompute_blocks, shape.num_blocks)
    fixed = _read_fixed(config)
    if view is None:
        plan = make_plan(workload, literal_size, recomputed, False, by_tokens=False)
        return RunPlan(plan, shape.num_blocks, fixed=fixed, is_literal=True)
    job = _make_job(config, view, precision, attention, shape, workload)
    is_literal = config.plan == "off"
    if is_literal:
        pages = job.can_page and config.page_optimizer != "no"
        planned = assess(job, make_plan(workload, literal_size, recomputed, pages, by_tokens=False))
    else:
        planned = choose_plan(job, fixed)
    memory = planned.memory
    needed = memory.least_process_bytes if job.is_card_full else memory.most_process_bytes
    if needed > job.budget_bytes:
        raise DoesNotFitError(f"needs {format_gib(needed)} of {format_gib(job.budget_bytes)}")
    limit = job.budget_bytes - memory.context_bytes - memory.paged_bytes if config.vram is not None else None
    return RunPlan(planned.plan, shape.num_blocks, job, fixed, is_literal, limit)


def _make_job(
    config: TrainConfig,
    view: CardView,
    precision: Precision,
    attention: AttentionKernel,
    shape: ModelShape,
    workload: Workload,
) -> Job:
    free = view.card.usable_bytes
    budget = free if config.vram is None else min(free, card_of_memory(config.vram).usable_bytes)
    return Job(
        shape=shape,
        rank=config.lora_r,
        workload=workload,
        card=view.card,
        budget_bytes=budget,
        value_bytes=4 if precision == "fp32" else 2,
        is_flash=attention.name != PER_SAMPLE,
        can_page=config.optimizer == "paged_adamw_32bit",
        is_card_full=budget == free,
        context_bytes=view.context_bytes,
    )


def _read_fixed(config: TrainConfig) -> Fixed:
    recomputed = config.recompute_blocks
    if recomputed is None and not config.gradient_checkpointing:
        recomputed = 0
    pages = {"auto": None, "yes": True, "no": False}[config.page_optimizer]
    if config.optimizer != "paged_adamw_32bit":
        pages = False
    size = min(config.micro_batch, config.effective_batch_size) if config.micro_batch is not None else None
    return Fixed(size, recomputed, pages)
