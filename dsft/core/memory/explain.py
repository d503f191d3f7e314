"""A plan in words: what it changes against the settings as written, what that brings, and by how much one misses."""

from dsft.core.memory.plan import ExecutionPlan, Job, PlannedRun, needed_bytes
from dsft.core.units import GIB, format_gib

_SAME_SPEED = 1.05
"""Predicted times closer than this are told as the same."""

_SAME_BYTES = GIB // 20


def explain_plan(job: Job, chosen: PlannedRun, literal: PlannedRun) -> str:
    """Say how a plan runs a step, against the plan that takes the settings as they are written.

    Args:
        job: What both were made for.
        chosen: The plan that is taken.
        literal: The settings as written.

    Returns:
        Such as "micro-batch 4 instead of 1: 2.1x faster, +6.2 GiB; 9 of 32 blocks recompute".
    """
    size, written_size = micro_batch_size(job, chosen.plan), micro_batch_size(job, literal.plan)
    recompute = explain_recompute(chosen.plan.num_recomputed, job.shape.num_blocks)
    if _steps(job, chosen.plan) == _steps(job, literal.plan):
        return f"as written: micro-batch {size}; {recompute}"
    if size != written_size:
        change = f"micro-batch {size} instead of {written_size}"
    else:
        change = f"micro-batch {size} as written"
    parts = [f"{change}: {_explain_effect(chosen, literal)}", recompute]
    if chosen.plan.pages_optimizer != literal.plan.pages_optimizer:
        parts.append("optimizer state " + ("paged" if chosen.plan.pages_optimizer else "on the device"))
    return "; ".join(parts)


def explain_recompute(num_recomputed: int, num_blocks: int) -> str:
    """Say how many blocks recompute their activations."""
    if num_recomputed == 0:
        return "no block recomputes"
    if num_recomputed == num_blocks:
        return f"all {num_blocks} blocks recompute"
    return f"{num_recomputed} of {num_blocks} blocks recompute"


def explain_misfit(job: Job, run: PlannedRun) -> str:
    """Say by how much a plan that does not fit misses the budget.

    Returns:
        Such as "needs 26.1 GiB, 3.3 GiB more than the 22.8 GiB a plan may take".
    """
    needed, missing, allowed = describe_lack(needed_bytes(job, run.memory), job.allowed_bytes)
    return f"needs {needed}, {missing} more than the {allowed} a plan may take"


def describe_lack(need: int, room: int) -> tuple[str, str, str]:
    """Return what is needed, what of it is missing and what there is, as figures that agree with one another.

    Where less than 1 GiB is missing they have two decimals, and more where two would not show that anything is.

    Args:
        need: Bytes needed.
        room: Bytes there are; fewer.
    """
    decimals = 1 if need - room >= GIB else 2
    while need > room and round(need / GIB, decimals) == round(room / GIB, decimals):
        decimals += 1
    need_gib, room_gib = round(need / GIB, decimals), round(room / GIB, decimals)
    needed, missing, there = (f"{gib:.{decimals}f} GiB" for gib in (need_gib, need_gib - room_gib, room_gib))
    return needed, missing, there


def micro_batch_size(job: Job, plan: ExecutionPlan) -> int:
    """Return the sequences in a micro-batch: the plan's number, and no more than a step has."""
    return min(plan.micro_batch_size, job.workload.effective_batch_size)


def _steps(job: Job, plan: ExecutionPlan) -> tuple[int, int, bool]:
    return micro_batch_size(job, plan), plan.num_recomputed, plan.pages_optimizer


def _explain_effect(chosen: PlannedRun, literal: PlannedRun) -> str:
    ratio = literal.time.step_s / chosen.time.step_s
    if ratio >= _SAME_SPEED:
        speed = f"{ratio:.1f}x faster"
    elif ratio <= 1 / _SAME_SPEED:
        speed = f"{1 / ratio:.1f}x slower"
    else:
        speed = "as fast"
    more = chosen.memory.process_bytes - literal.memory.process_bytes
    if abs(more) < _SAME_BYTES:
        return f"{speed}, in the same memory"
    return f"{speed}, {'+' if more > 0 else '-'}{format_gib(abs(more))}"
