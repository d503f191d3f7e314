"""`dsft estimate-memory`: plan for a card, without the card, the weights or PyTorch."""

from dsft.core.config.load import load_train_config
from dsft.core.config.presets import list_presets
from dsft.core.config.schema import DEFAULT_DATASET, TrainConfig
from dsft.core.memory.explain import explain_misfit, explain_plan
from dsft.core.memory.generation import GenerationLoad, estimate_generation
from dsft.core.memory.host import (
    RunFiles,
    estimate_disk,
    estimate_host_memory,
    estimate_streamed_merge,
    estimate_whole_merge,
)
from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.remedies import find_remedies, least_budget_bytes
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.longest import find_longest
from dsft.estimate_memory.model import EstimatedModel, find_shape
from dsft.estimate_memory.plans import Planned, has_flash_kernel, has_validation, plan_training
from dsft.estimate_memory.result import Breakdown, Comparison, HostNeeds, PresetEstimate

DEFAULT_DATASET_TOKENS = 3_300_000
"""Tokens of the default data set, about: what the seed document's speeds and times of an epoch imply."""


def compare_presets(budget: Budget) -> Comparison:
    """Plan every preset that trains on a GPU."""
    presets, notices = [], []
    for preset in list_presets():
        config = load_train_config(preset.name).config
        if config.device == "cpu":
            notices.append(f"{preset.name} trains on the CPU and is left out.")
            continue
        model = find_shape(config)
        planned = plan_training(config, model, budget)
        memory_gb = preset.reference.memory_gb if preset.reference is not None else None
        presets.append(PresetEstimate(preset.name, config, planned, explain(planned), memory_gb))
        notices += _flash_notices(preset.name, config, budget) + _engine_notices(preset.name, config, model)
    return Comparison(budget, tuple(presets), tuple(notices))


def break_down(config: TrainConfig, budget: Budget, *, finds_longest: bool = False) -> Breakdown:
    """Plan one configuration and take its memory apart.

    Args:
        config: The settings.
        budget: The card.
        finds_longest: Take the longest length that fits in place of `max_length`.

    Raises:
        DsftError: The model can't be found or trained, or no length fits.
    """
    model = find_shape(config)
    longest_possible = None
    if finds_longest:
        length, longest_possible = find_longest(config, model, budget)
        config = config.model_copy(update={"max_length": length})
    else:
        model.check_length(config.max_length)
    planned = plan_training(config, model, budget)
    subject = "the configuration"
    notices = _flash_notices(subject, config, budget) + _engine_notices(subject, config, model)
    if config.device == "cpu":
        notices.append("device is cpu: the run takes host memory; this is what it would take of a GPU.")
    return Breakdown(
        budget=budget,
        config=config,
        shape=model.shape,
        planned=planned,
        explanation=explain(planned),
        remedies=() if planned.chosen.fits else tuple(find_remedies(planned.job, planned.fixed)),
        least_budget_bytes=least_budget_bytes(planned.job, planned.fixed),
        generation={
            name: estimate_generation(GenerationLoad(model.shape, rank, config.max_length, is_4bit), budget.card)
            for name, rank, is_4bit in (
                ("4 bits, with the adapter", config.lora_r, True),
                ("16 bits, with the adapter", config.lora_r, False),
                ("16 bits, merged", 0, False),
            )
        },
        host=_host_needs(config, model.shape, planned),
        found_length=finds_longest,
        longest_possible=longest_possible,
        notices=tuple(notices),
    )


def explain(planned: Planned) -> str:
    """Say what a plan is, and by how much it misses where it does not fit."""
    words = explain_plan(planned.job, planned.chosen, planned.literal)
    if planned.chosen.fits:
        return words
    return f"does not fit: {explain_misfit(planned.job, planned.chosen)} ({words})"


def _flash_notices(subject: str, config: TrainConfig, budget: Budget) -> list[str]:
    if config.use_flash_attention and not has_flash_kernel(budget):
        return [
            f"{subject} demands a flash kernel, and {budget.card.name} has none: dsft train takes it only with "
            "--no-use-flash-attention, which is what is planned here."
        ]
    return []


def _engine_notices(subject: str, config: TrainConfig, model: EstimatedModel) -> list[str]:
    obstacle = model.find_engine_obstacle(config)
    if config.engine == "off" or obstacle is None:
        return []
    return [
        f"{subject} is planned for transformers' and PEFT's own modules, without dsft's engine, because {obstacle}."
    ]


def _host_needs(config: TrainConfig, shape: ModelShape, planned: Planned) -> HostNeeds:
    files = RunFiles(
        shape=shape,
        rank=config.lora_r,
        num_checkpoints=config.save_total_limit,
        has_validation=has_validation(config),
        num_dataset_tokens=DEFAULT_DATASET_TOKENS if config.dataset == DEFAULT_DATASET else None,
        paged_out_bytes=planned.chosen.memory.paged_out_bytes,
        value_bytes=planned.job.value_bytes,
    )
    return HostNeeds(
        memory=estimate_host_memory(files),
        disk=estimate_disk(files),
        streamed_merge_bytes=estimate_streamed_merge(shape, config.lora_r),
        whole_merge_bytes=estimate_whole_merge(shape, config.lora_r),
    )
