"""A configuration as a planning job: what its steps hold, what of the plan the user has decided, and the plan."""

from dataclasses import dataclass, replace

from dsft.core.config.schema import TrainConfig
from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.plan import Fixed, Job, PlannedRun, Workload, assess, choose_plan, plan_literally
from dsft.core.models.device import Device, resolve_precision
from dsft.estimate_memory.budget import Budget


@dataclass(frozen=True)
class Planned:
    """What was planned for a configuration.

    Attributes:
        job: The planning job.
        fixed: What of the plan the settings decide.
        chosen: The plan a run would take.
        literal: The settings as written.
    """

    job: Job
    fixed: Fixed
    chosen: PlannedRun
    literal: PlannedRun

    @property
    def tok_per_s(self) -> float:
        """Predicted tokens a second."""
        return self.job.workload.mean_step_tokens / self.chosen.time.step_s

    @property
    def speed_up(self) -> float:
        """How many times faster the plan is than the settings as written."""
        return self.literal.time.step_s / self.chosen.time.step_s


def plan_training(config: TrainConfig, shape: ModelShape, budget: Budget) -> Planned:
    """Plan a configuration whose sequences are all as long as they may be.

    Raises:
        ConfigError: The card does not compute in the precision that is asked for.
    """
    job = make_job(config, shape, budget)
    fixed = fix_settings(config, shape.num_blocks)
    literal = _take_literally(config, job)
    if config.plan == "auto":
        return Planned(job, fixed, choose_plan(job, fixed), literal)
    return Planned(job, fixed, _override(job, literal, config), literal)


def make_job(config: TrainConfig, shape: ModelShape, budget: Budget) -> Job:
    """Return the planning job of a configuration on a card."""
    device = Device("cuda", budget.card.name, budget.card.capability)
    precision = resolve_precision(config.precision, device)
    workload = Workload.of_full_sequences(config.effective_batch_size, config.max_length)
    if not has_validation(config):
        workload = replace(workload, longest_validation=0)
    return Job(
        shape=shape,
        rank=config.lora_r,
        workload=workload,
        card=budget.card,
        budget_bytes=budget.card.usable_bytes,
        value_bytes=4 if precision == "fp32" else 2,
        is_flash=has_flash_kernel(budget) and precision != "fp32",
        can_page=config.optimizer == "paged_adamw_32bit",
    )


def has_flash_kernel(budget: Budget) -> bool:
    """Return whether there are variable-length flash kernels for the card: from compute capability 8.0 on."""
    return budget.card.capability >= (8, 0)


def has_validation(config: TrainConfig) -> bool:
    """Return whether a run measures a validation loss."""
    return config.validation_dataset is not None or config.validation_split > 0


def fix_settings(config: TrainConfig, num_blocks: int) -> Fixed:
    """Return what the settings decide of the plan; with `plan: off` that is all of it."""
    num_recomputed = config.recompute_blocks
    if num_recomputed is None and not config.gradient_checkpointing:
        num_recomputed = 0
    pages = _paging(config)
    size = config.micro_batch
    if config.plan == "auto":
        return Fixed(None if size is None else min(size, config.effective_batch_size), num_recomputed, pages)
    return Fixed(
        micro_batch_size=min(size or config.per_device_train_batch_size, config.effective_batch_size),
        num_recomputed=num_blocks if num_recomputed is None else num_recomputed,
        pages_optimizer=config.optimizer == "paged_adamw_32bit" if pages is None else pages,
    )


def _paging(config: TrainConfig) -> bool | None:
    if config.optimizer != "paged_adamw_32bit":
        return False
    return None if config.page_optimizer == "auto" else config.page_optimizer == "yes"


def _take_literally(config: TrainConfig, job: Job) -> PlannedRun:
    return plan_literally(
        job,
        config.per_device_train_batch_size,
        recomputes=config.gradient_checkpointing,
        pages_optimizer=job.can_page,
    )


def _override(job: Job, literal: PlannedRun, config: TrainConfig) -> PlannedRun:
    fixed = fix_settings(config, job.shape.num_blocks)
    size, num_recomputed, pages = fixed.micro_batch_size, fixed.num_recomputed, fixed.pages_optimizer
    if size is None or num_recomputed is None or pages is None:
        raise ValueError("with plan off all of the plan is decided")
    written = plan_literally(job, size, recomputes=num_recomputed > 0, pages_optimizer=pages)
    return assess(job, replace(written.plan, num_recomputed=min(num_recomputed, job.shape.num_blocks)))
