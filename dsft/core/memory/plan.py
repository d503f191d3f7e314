"""The execution plan: how an optimizer step is run on a given card, chosen for the least time that fits."""

from collections.abc import Iterator
from dataclasses import dataclass

from dsft.core.memory.cards import Card
from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.speed import StepTime, predict_step
from dsft.core.memory.training import (
    TrainingLoad,
    TrainingMemory,
    estimate_training,
    loading_holes_bytes,
    optimizer_state_bytes,
)

MARGIN_SHARE = 0.03
"""Share of the budget that a plan leaves free: half for the estimate's error, half for what else uses the card."""

SHRINK_SHARE = 0.9
"""After an out-of-memory error the next plan needs at most this share of what the failed one did beyond the weights."""


@dataclass(frozen=True)
class ExecutionPlan:
    """How an optimizer step is run; decides speed and memory, never the result.

    Attributes:
        micro_batch_size: Sequences of the greatest length in one forward and backward pass.
        micro_batch_tokens: Most tokens in it, unless a single sequence is longer.
        splits_by_tokens: Whether shorter sequences may be more in number, as long as their tokens are not.
        num_recomputed: Blocks, from the first, that recompute their activations in the backward pass.
        pages_optimizer: Whether the optimizer state can page to host memory.
        validation_tokens: Most tokens in one validation pass, unless a single sample is longer.
    """

    micro_batch_size: int
    micro_batch_tokens: int
    splits_by_tokens: bool
    num_recomputed: int
    pages_optimizer: bool
    validation_tokens: int


@dataclass(frozen=True)
class Workload:
    """What the optimizer steps of a run consist of.

    Attributes:
        effective_batch_size: Sequences in a step.
        longest_sequence: Tokens of the longest sequence (with packing: of a pack).
        mean_step_tokens: Tokens of a step, on average.
        max_step_tokens: Tokens of the largest step.
        longest_validation: Tokens of the longest validation sample; 0 where there is no validation.
    """

    effective_batch_size: int
    longest_sequence: int
    mean_step_tokens: float
    max_step_tokens: int
    longest_validation: int = 0

    @classmethod
    def of_full_sequences(cls, effective_batch_size: int, max_length: int) -> "Workload":
        """Return the workload of sequences that are all as long as they may be."""
        tokens = effective_batch_size * max_length
        return cls(effective_batch_size, max_length, tokens, tokens, max_length)


@dataclass(frozen=True)
class Job:
    """What a plan is made for.

    Attributes:
        shape: The model.
        rank: LoRA rank.
        workload: What its steps consist of.
        card: Where it runs.
        budget_bytes: What the process may take of the card.
        value_bytes: Bytes of a value in the compute type.
        is_flash: Whether a flash kernel computes attention.
        has_dropout: Whether LoRA drops a share of its inputs.
        can_page: Whether the optimizer is one whose state can page.
        is_card_full: Whether the budget is all there is. Where the card has more, paged state stays on it and counts.
        context_bytes: CUDA's own memory where it was measured.
        uses_engine: Whether dsft's engine computes the blocks.
    """

    shape: ModelShape
    rank: int
    workload: Workload
    card: Card
    budget_bytes: int
    value_bytes: int = 2
    is_flash: bool = True
    has_dropout: bool = False
    can_page: bool = True
    is_card_full: bool = True
    context_bytes: int | None = None
    uses_engine: bool = False

    @property
    def allowed_bytes(self) -> int:
        """The budget less the margin."""
        return int(self.budget_bytes * (1 - MARGIN_SHARE))


@dataclass(frozen=True)
class Fixed:
    """What the user has decided about a plan; None leaves it to the search."""

    micro_batch_size: int | None = None
    num_recomputed: int | None = None
    pages_optimizer: bool | None = None


@dataclass(frozen=True)
class PlannedRun:
    """A plan with what is predicted of it.

    Attributes:
        plan: The plan.
        memory: Its memory at the largest micro-batch there can be.
        time: Its time for an average step.
        fits: Whether the memory is within the budget less the margin.
    """

    plan: ExecutionPlan
    memory: TrainingMemory
    time: StepTime
    fits: bool


def make_plan(
    workload: Workload, micro_batch_size: int, num_recomputed: int, pages_optimizer: bool, *, by_tokens: bool = True
) -> ExecutionPlan:
    """Return a plan whose micro-batches hold as many tokens as `micro_batch_size` of the longest sequences."""
    tokens = micro_batch_size * workload.longest_sequence
    if by_tokens:
        validation_tokens = min(tokens, workload.max_step_tokens)
    else:  # as many as a typical micro-batch of so many sequences has
        mean = workload.mean_step_tokens / workload.effective_batch_size
        validation_tokens = max(workload.longest_sequence, micro_batch_size * round(mean))
    return ExecutionPlan(
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=tokens,
        splits_by_tokens=by_tokens,
        num_recomputed=num_recomputed,
        pages_optimizer=pages_optimizer,
        validation_tokens=validation_tokens,
    )


def assess(job: Job, plan: ExecutionPlan) -> PlannedRun:
    """Predict memory and time of a plan."""
    tokens = largest_micro_batch(job.workload, plan)
    memory = predict_memory(job, plan, tokens, tokens)
    # What does not fit beside the rest pages out in every step.
    paged = memory.paged_bytes + memory.paged_out_bytes
    outside = max(0, min(paged, memory.most_process_bytes - job.allowed_bytes)) if job.is_card_full else 0
    time = predict_step(
        job.shape,
        job.rank,
        job.card,
        step_tokens=job.workload.mean_step_tokens,
        num_passes=count_passes(job.workload, plan),
        num_recomputed=plan.num_recomputed,
        paged_bytes=outside,
        uses_engine=job.uses_engine,
    )
    return PlannedRun(plan, memory, time, needed_bytes(job, memory) <= job.allowed_bytes)


def predict_memory(job: Job, plan: ExecutionPlan, num_tokens: int, num_targets: int) -> TrainingMemory:
    """Predict the memory of a plan whose largest micro-batch has so many tokens and targets."""
    longest = job.workload.longest_validation
    load = TrainingLoad(
        shape=job.shape,
        rank=job.rank,
        num_tokens=num_tokens,
        num_targets=num_targets,
        # Validation passes are filled up to what the plan allows them.
        num_validation_tokens=max(longest, plan.validation_tokens) if longest else 0,
        value_bytes=job.value_bytes,
        is_flash=job.is_flash,
        has_dropout=job.has_dropout,
        num_recomputed=plan.num_recomputed,
        pages_optimizer=plan.pages_optimizer,
        uses_engine=job.uses_engine,
    )
    return estimate_training(load, job.card, context_bytes=job.context_bytes)


def needed_bytes(job: Job, memory: TrainingMemory) -> int:
    """Return what decides whether a run fits: paged state counts only where the card has room beyond the budget."""
    return memory.least_process_bytes if job.is_card_full else memory.most_process_bytes


def count_passes(workload: Workload, plan: ExecutionPlan) -> int:
    """Return the micro-batches of an average step: sequences by their number, or tokens by theirs (a lower bound)."""
    if not plan.splits_by_tokens:
        return -(-workload.effective_batch_size // plan.micro_batch_size)
    return max(1, -(-int(workload.mean_step_tokens) // plan.micro_batch_tokens))


def largest_micro_batch(workload: Workload, plan: ExecutionPlan) -> int:
    """Return a bound of the tokens of a micro-batch: what the plan allows, and no more than a step has."""
    return max(workload.longest_sequence, min(plan.micro_batch_tokens, workload.max_step_tokens))


def choose_plan(job: Job, fixed: Fixed | None = None) -> PlannedRun:
    """Choose the plan of least predicted time among those that fit; without any that fits, the smallest.

    Equal times are decided for less memory, so the choice is deterministic.
    """
    runs = list(_candidates(job, fixed or Fixed()))
    fitting = [run for run in runs if run.fits]
    if fitting:
        return min(fitting, key=lambda run: (round(run.time.step_s, 4), run.memory.process_bytes))
    return min(runs, key=lambda run: (needed_bytes(job, run.memory), run.time.step_s))


def choose_smaller_plan(
    job: Job, failed: ExecutionPlan, free_bytes: int, fixed: Fixed | None = None
) -> PlannedRun | None:
    """Choose the next plan after one ran out of memory, or None where there is nothing smaller.

    The next one needs no more than is free now, and at most `SHRINK_SHARE` of what the failed one needed for a step:
    the fastest of those there are, else the smallest of all. State that pages stays where it can.

    Args:
        job: What the plans are made for.
        failed: The plan that ran out of memory.
        free_bytes: What a step could have now, beyond what stays from step to step.
        fixed: What the user has decided.
    """
    before = assess(job, failed).memory
    limit = needed_bytes(job, before)
    smaller = [
        run
        for run in _candidates(job, fixed or Fixed())
        if needed_bytes(job, run.memory) < limit and run.plan.pages_optimizer >= failed.pages_optimizer
    ]
    if not smaller:
        return None
    most = limit - round((1 - SHRINK_SHARE) * before.step_bytes)
    state_bytes, _ = optimizer_state_bytes(job.shape, job.rank, pages=False)

    # What is free is not all usable: the holes that loading has left, and the margin of every plan.
    usable_bytes = free_bytes - loading_holes_bytes(job.shape) - (job.budget_bytes - job.allowed_bytes)

    def fits(run: PlannedRun) -> bool:
        # State that begins to page makes room where something else takes it.
        begins_to_page = run.plan.pages_optimizer and not failed.pages_optimizer and job.is_card_full
        free = usable_bytes + (state_bytes if begins_to_page else 0)
        return needed_bytes(job, run.memory) <= most and run.memory.step_bytes <= free

    fitting = [run for run in smaller if fits(run)]
    if fitting:
        return min(fitting, key=lambda run: (round(run.time.step_s, 4), run.memory.process_bytes))
    return min(smaller, key=lambda run: (needed_bytes(job, run.memory), run.time.step_s))


def _candidates(job: Job, fixed: Fixed) -> Iterator[PlannedRun]:
    """Yield every plan that the user's decisions leave."""
    for pages in [fixed.pages_optimizer] if fixed.pages_optimizer is not None else _paging(job):
        for size in [fixed.micro_batch_size] if fixed.micro_batch_size is not None else micro_batch_sizes(job.workload):
            if fixed.num_recomputed is not None:
                yield assess(job, make_plan(job.workload, size, min(fixed.num_recomputed, job.shape.num_blocks), pages))
                continue
            for num_recomputed in range(job.shape.num_blocks + 1):
                yield assess(job, make_plan(job.workload, size, num_recomputed, pages))


def _paging(job: Job) -> list[bool]:
    return [False, True] if job.can_page else [False]


def micro_batch_sizes(workload: Workload) -> list[int]:
    """Return the micro-batch sizes a search tries: for each number of passes of an average step the smallest.

    A larger one with as many passes takes more memory and no less time, so the search misses nothing.
    """
    sizes: list[int] = []
    fewest = 0
    for size in range(1, workload.effective_batch_size + 1):
        passes = count_passes(workload, make_plan(workload, size, 0, False))
        if not sizes or passes < fewest:
            sizes.append(size)
            fewest = passes
    return sizes


def describe_change(failed: ExecutionPlan, plan: ExecutionPlan) -> str:
    """Return what a plan does otherwise than the one it takes the place of, in one phrase."""
    changes = []
    if plan.micro_batch_tokens != failed.micro_batch_tokens:
        changes.append(f"micro-batches of up to {plan.micro_batch_tokens:,} tokens, not {failed.micro_batch_tokens:,}")
    if plan.num_recomputed != failed.num_recomputed:
        changes.append(f"{plan.num_recomputed} blocks recompute, not {failed.num_recomputed}")
    if plan.pages_optimizer != failed.pages_optimizer:
        where = "can page to host memory" if plan.pages_optimizer else "stays on the device"
        changes.append(f"the optimizer state {where}")
    return "; ".join(changes)
