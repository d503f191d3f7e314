"""What the trainer tells after a step, a validation pass and a checkpoint, and to whom; data only."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsft.train.recovery import PlanChange


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step told.

    Attributes:
        step: Optimizer steps done, this one included.
        epoch: Epochs done, with fraction.
        loss: Mean cross-entropy over the step's targets, nats.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: The rate the step was taken with.
        num_tokens: Tokens of the step.
        num_targets: Target tokens of the step.
        duration_s: Wall time from the end of the step before.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_targets: int
    duration_s: float


@dataclass(frozen=True)
class ValidationReport:
    """What one validation pass told: the mean cross-entropy over all targets, in nats."""

    step: int
    loss: float
    num_targets: int
    is_best: bool
    duration_s: float


@dataclass(frozen=True)
class TrainerHooks:
    """Whom the trainer tells what."""

    on_step: Callable[[StepReport], None]
    on_validation: Callable[[ValidationReport], None]
    on_checkpoint: Callable[[int, Path], None]
    on_interrupt: Callable[[str], None]
    on_plan_change: Callable[["PlanChange"], None]
