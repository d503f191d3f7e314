"""An estimate as one JSON object: bytes, seconds and counts, with the unit in every key."""

from dataclasses import asdict
from typing import Any

from dsft.core.config.schema import TrainConfig
from dsft.core.memory.explain import micro_batch_size
from dsft.core.memory.generation import GenerationMemory
from dsft.core.memory.plan import MARGIN_SHARE, Job, PlannedRun, needed_bytes
from dsft.core.memory.training import Term
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.plans import Planned
from dsft.estimate_memory.result import Breakdown, Comparison

_SETTINGS = ("model_name", "max_length", "lora_r", "effective_batch_size", "optimizer", "precision", "plan")


def record_comparison(result: Comparison) -> dict[str, Any]:
    """Return the presets as an object."""
    return {
        "budget": _record_budget(result.budget),
        "fits": result.fits,
        "presets": [
            {"preset": preset.name}
            | _record_planned(preset.config, preset.planned, preset.explanation)
            | {"seed_memory_gb": preset.seed_memory_gb}
            for preset in result.presets
        ],
        "notices": list(result.notices),
    }


def record_breakdown(result: Breakdown) -> dict[str, Any]:
    """Return one configuration as an object."""
    return {
        "budget": _record_budget(result.budget),
        **_record_planned(result.config, result.planned, result.explanation),
        "is_longest_length": result.found_length,
        "longest_length_of_model": result.longest_possible,
        "remedies": [asdict(remedy) for remedy in result.remedies],
        "least_budget_bytes": result.least_budget_bytes,
        "inference": {name: _record_generation(memory) for name, memory in result.generation.items()},
        "merge": {
            "streamed_host_bytes": result.host.streamed_merge_bytes,
            "whole_host_bytes": result.host.whole_merge_bytes,
        },
        "host_memory": _record_terms(result.host.memory),
        "disk": _record_terms(result.host.disk),
        "notices": list(result.notices),
    }


def _record_budget(budget: Budget) -> dict[str, Any]:
    card = budget.card
    return {
        "card": card.name,
        "origin": budget.origin,
        "total_bytes": card.total_bytes,
        "budget_bytes": card.usable_bytes,
        "margin_share": MARGIN_SHARE,
        "is_card_measured": card.is_measured,
    }


def _record_planned(config: TrainConfig, planned: Planned, explanation: str) -> dict[str, Any]:
    return {
        "settings": {name: getattr(config, name) for name in _SETTINGS},
        "fits": planned.chosen.fits,
        "allowed_bytes": planned.job.allowed_bytes,
        "explanation": explanation,
        "uses_engine": planned.job.uses_engine,
        "plan": _record_run(planned.job, planned.chosen),
        "as_written": _record_run(planned.job, planned.literal),
        "speed_up": planned.speed_up,
    }


def _record_run(job: Job, run: PlannedRun) -> dict[str, Any]:
    memory = run.memory
    return {
        "micro_batch_size": micro_batch_size(job, run.plan),
        "micro_batch_tokens": run.plan.micro_batch_tokens,
        "recomputed_blocks": run.plan.num_recomputed,
        "num_blocks": job.shape.num_blocks,
        "pages_optimizer": run.plan.pages_optimizer,
        "needed_bytes": needed_bytes(job, memory),
        "allocated_bytes": memory.allocated_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "process_bytes": memory.process_bytes,
        "device_bytes": memory.device_bytes,
        "paged_out_bytes": memory.paged_out_bytes,
        "peak_moment": memory.peak_moment,
        "step_s": run.time.step_s,
        "tok_per_s": job.workload.mean_step_tokens / run.time.step_s,
        "terms": _record_terms(memory.terms),
    }


def _record_generation(memory: GenerationMemory) -> dict[str, Any]:
    return {
        "allocated_bytes": memory.allocated_bytes,
        "process_bytes": memory.process_bytes,
        "terms": _record_terms(memory.terms),
    }


def _record_terms(terms: tuple[Term, ...]) -> list[dict[str, Any]]:
    return [
        {"name": term.name, "group": str(term.group), "bytes": term.num_bytes, "formula": term.formula}
        for term in terms
    ]
