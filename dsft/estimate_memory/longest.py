"""The longest sequences that a configuration can train with on a card."""

from collections.abc import Callable
from dataclasses import replace

from dsft.core.config.schema import TrainConfig
from dsft.core.errors import DoesNotFitError, ModelError
from dsft.core.memory.explain import explain_misfit
from dsft.core.memory.plan import choose_plan
from dsft.core.memory.settings import fix_settings
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.model import EstimatedModel
from dsft.estimate_memory.plans import make_job, plan_training

STEP_TOKENS = 64
"""Lengths are multiples of this."""


def find_longest(config: TrainConfig, model: EstimatedModel, budget: Budget) -> tuple[int, int]:
    """Find the longest length that fits, by bisection: longer sequences never need less.

    Args:
        config: All other settings.
        model: The model.
        budget: The card.

    Returns:
        The length, and the longest the model itself takes; both are multiples of `STEP_TOKENS`.

    Raises:
        DoesNotFitError: Not even the shortest fits.
        ModelError: The model's config.json does not say how many positions it has.
    """
    most = _longest_of_model(model)

    def fits(length: int) -> bool:
        candidate = config.model_copy(update={"max_length": length})
        if config.plan == "off":
            return plan_training(candidate, model, budget).chosen.fits
        job = make_job(candidate, model, budget)
        fixed = fix_settings(candidate, model.shape.num_blocks)
        # Whatever fits with larger micro-batches fits with those of one sequence.
        return choose_plan(job, replace(fixed, micro_batch_size=fixed.micro_batch_size or 1)).fits

    if not fits(STEP_TOKENS):
        shortest = plan_training(config.model_copy(update={"max_length": STEP_TOKENS}), model, budget)
        raise DoesNotFitError(
            f"No length fits: even with {STEP_TOKENS} tokens the run {explain_misfit(shortest.job, shortest.chosen)}.",
            "Take a smaller model, a lower --lora-r or a larger card.",
        )
    return STEP_TOKENS * _last_true(lambda steps: fits(steps * STEP_TOKENS), most // STEP_TOKENS), most


def _longest_of_model(model: EstimatedModel) -> int:
    positions = model.source.model_config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < STEP_TOKENS:
        raise ModelError(
            f"config.json of {model.source.name}: max_position_embeddings is {positions!r}, so no longest length "
            "can be found.",
            "Give a length with --max-length N.",
        )

    def takes(steps: int) -> bool:
        try:
            model.check_length(steps * STEP_TOKENS)
        except ModelError:
            return False
        return True

    return STEP_TOKENS * _last_true(takes, positions // STEP_TOKENS)


def _last_true(is_true: Callable[[int], bool], most: int) -> int:
    """Return the greatest number up to `most` of which something holds that holds of 1 and of no number after it."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_true(middle) else (low, middle - 1)
    return low
