"""A configuration as a planning job: what its steps hold, what of the plan the user has decided, and the plan."""

from dataclasses import dataclass, replace

from dsft.core.config.schema import TrainConfig
from dsft.core.memory.plan import Fixed, Job, PlannedRun, Workload, assess, choose_plan
from dsft.core.memory.settings import can_page, fix_settings, take_literally
from dsft.core.models.device import Device, resolve_precision
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.model import EstimatedModel


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
    def gives_way(self) -> bool:
        """Whether it fits only because paged state, which takes what room there is, leaves where it is in the way."""
        return self.chosen.fits and self.chosen.memory.process_bytes > self.job.allowed_bytes

    @property
    def speed_up(self) -> float:
        """How many times faster the plan is than the settings as written."""
        return self.literal.time.step_s / self.chosen.time.step_s


def plan_training(config: TrainConfig, model: EstimatedModel, budget: Budget) -> Planned:
    """Plan a configuration whose sequences are all as long as they may be.

    Raises:
        ConfigError: The card does not compute in the precision that is asked for.
    """
    job = make_job(config, model, budget)
    fixed = fix_settings(config, model.shape.num_blocks)
    as_written = config.model_copy(update={"micro_batch": None, "recompute_blocks": None, "page_optimizer": "auto"})
    literal = assess(job, take_literally(as_written, job.workload, model.shape.num_blocks))
    if config.plan == "auto":
        return Planned(job, fixed, choose_plan(job, fixed), literal)
    return Planned(job, fixed, assess(job, take_literally(config, job.workload, model.shape.num_blocks)), literal)


def make_job(config: TrainConfig, model: EstimatedModel, budget: Budget) -> Job:
    """Return the planning job of a configuration on a card."""
    device = Device("cuda", budget.card.name, budget.card.capability)
    precision = resolve_precision(config.precision, device)
    workload = Workload.of_full_sequences(config.effective_batch_size, config.max_length)
    if not has_validation(config):
        workload = replace(workload, longest_validation=0)
    return Job(
        shape=model.shape,
        rank=config.lora_r,
        workload=workload,
        card=budget.card,
        budget_bytes=budget.card.usable_bytes,
        value_bytes=4 if precision == "fp32" else 2,
        is_flash=has_flash_kernel(budget) and precision != "fp32",
        can_page=can_page(config),
        has_dropout=config.lora_dropout > 0,
        uses_engine=config.engine == "auto" and model.find_engine_obstacle(config) is None,
    )


def has_flash_kernel(budget: Budget) -> bool:
    """Return whether there are variable-length flash kernels for the card: from compute capability 8.0 on."""
    return budget.card.capability >= (8, 0)


def has_validation(config: TrainConfig) -> bool:
    """Return whether a run measures a validation loss."""
    return config.validation_dataset is not None or config.validation_split > 0
