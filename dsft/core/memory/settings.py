"""What the settings of a run decide about its plan."""

from dsft.core.config.schema import TrainConfig
from dsft.core.memory.plan import ExecutionPlan, Fixed, Workload, make_plan


def can_page(config: TrainConfig) -> bool:
    """Return whether the optimizer is one whose state can page."""
    return config.optimizer == "paged_adamw_32bit"


def fix_settings(config: TrainConfig, num_blocks: int) -> Fixed:
    """Return what the settings decide of the plan; with `plan: off` that is all of it."""
    recomputed = config.recompute_blocks
    if recomputed is None and not config.gradient_checkpointing:
        recomputed = 0
    pages = None if config.page_optimizer == "auto" else config.page_optimizer == "yes"
    if not can_page(config):
        pages = False
    size = config.micro_batch
    if config.plan == "off":
        size = size or config.per_device_train_batch_size
        recomputed = num_blocks if recomputed is None else recomputed
        pages = can_page(config) if pages is None else pages
    return Fixed(
        micro_batch_size=None if size is None else min(size, config.effective_batch_size),
        num_recomputed=None if recomputed is None else min(recomputed, num_blocks),
        pages_optimizer=pages,
    )


def take_literally(config: TrainConfig, workload: Workload, num_blocks: int) -> ExecutionPlan:
    """Return the plan that takes the settings as they are written."""
    fixed = fix_settings(config.model_copy(update={"plan": "off"}), num_blocks)
    return make_plan(
        workload,
        fixed.micro_batch_size or 1,
        fixed.num_recomputed or 0,
        bool(fixed.pages_optimizer),
        by_tokens=False,
    )
