"""Which changes of the settings make a run fit that does not, those that cost the result least first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dsft.core.memory.plan import MARGIN_SHARE, Fixed, Job, PlannedRun, Workload, choose_plan, needed_bytes
from dsft.core.units import format_gib

SHORTEST_LENGTH = 128
"""Shorter sequences hold hardly an instruction with its answer: they are no advice."""

LOWEST_RANK = 8


@dataclass(frozen=True)
class Remedy:
    """A change of the settings that lets a run take less memory.

    Attributes:
        change: The flags to add, e.g. "--max-length 512".
        saved_bytes: By how much the smallest plan gets smaller.
        fits: Whether the run fits with this change.
    """

    change: str
    saved_bytes: int
    fits: bool


@dataclass(frozen=True)
class _Change:
    flags: str
    job: Job
    fixed: Fixed


def find_remedies(job: Job, fixed: Fixed | None = None) -> list[Remedy]:
    """Find what makes a run fit.

    First come changes of how a step is run, which leave the result as it is, then shorter sequences, then lower ranks;
    lengths and ranks are halved until one fits. Only where no change does it alone, the mildest combination follows
    that does.

    Args:
        job: What does not fit.
        fixed: What the user has decided about its plan.

    Returns:
        The changes that save memory; nothing where the run fits, or where no change of the settings helps.
    """
    fixed = fixed or Fixed()
    if _fits(job, fixed):
        return []
    present = least_bytes(job, fixed)
    judged = [(change, _judge(change, present)) for change in _execution_changes(job, fixed)]
    execution = [change for change, remedy in judged if remedy.saved_bytes > 0]
    alone = [remedy for _, remedy in judged]
    alone += _until_fitting(_shorter(job, fixed), present) + _until_fitting(_lower(job, fixed), present)
    remedies = [remedy for remedy in alone if remedy.saved_bytes > 0]
    if not any(remedy.fits for remedy in remedies):
        remedies += _combine(job, fixed, execution, present)
    return remedies


def list_remedies(remedies: Sequence[Remedy]) -> str:
    """Return those remedies that are enough, each of them alone, in one line, cheapest first, with what each saves."""
    enough = [remedy for remedy in remedies if remedy.fits]
    return ", or ".join(f"{remedy.change} (saves {format_gib(remedy.saved_bytes)})" for remedy in enough)


def least_bytes(job: Job, fixed: Fixed | None = None) -> int:
    """Return what the smallest plan needs that the user's decisions leave."""
    return needed_bytes(job, _smallest(job, fixed or Fixed()).memory)


def least_budget_bytes(job: Job, fixed: Fixed | None = None) -> int:
    """Return the budget with which the smallest plan would fit, margin included."""
    return round(least_bytes(job, fixed) / (1 - MARGIN_SHARE)) + 1


def _smallest(job: Job, fixed: Fixed) -> PlannedRun:
    # Where nothing fits, `choose_plan` returns what needs least.
    return choose_plan(replace(job, budget_bytes=0), _narrow(fixed))


def _fits(job: Job, fixed: Fixed) -> bool:
    return choose_plan(job, _narrow(fixed)).fits


def _narrow(fixed: Fixed) -> Fixed:
    """Return the decisions that leave the smallest plans only: no micro-batch needs less than one of one sequence."""
    return replace(fixed, micro_batch_size=fixed.micro_batch_size or 1)


def _judge(change: _Change, present: int) -> Remedy:
    saved = present - least_bytes(change.job, change.fixed)
    return Remedy(change.flags, saved, _fits(change.job, change.fixed))


def _until_fitting(changes: Iterator[_Change], present: int) -> list[Remedy]:
    remedies = []
    for change in changes:
        remedies.append(_judge(change, present))
        if remedies[-1].fits:
            break
    return remedies


def _execution_changes(job: Job, fixed: Fixed) -> Iterator[_Change]:
    """Yield one change for each decision of the user that costs memory, with the mildest value that fits."""
    num_blocks, num_recomputed = job.shape.num_blocks, fixed.num_recomputed
    if num_recomputed is not None and num_recomputed < num_blocks:
        more = [replace(fixed, num_recomputed=number) for number in range(num_recomputed + 1, num_blocks + 1)]
        least = next((choice for choice in more if _fits(job, choice)), more[-1])
        yield _Change(f"--recompute-blocks {least.num_recomputed}", job, least)
    if fixed.micro_batch_size is not None and fixed.micro_batch_size > 1:
        fewer = [replace(fixed, micro_batch_size=size) for size in _halvings(fixed.micro_batch_size, 1)]
        largest = next((choice for choice in fewer if _fits(job, choice)), fewer[-1])
        yield _Change(f"--micro-batch {largest.micro_batch_size}", job, largest)
    if not job.can_page:
        paged = replace(fixed, pages_optimizer=None)
        yield _Change("--optimizer paged_adamw_32bit", replace(job, can_page=True), paged)
    elif fixed.pages_optimizer is False:
        yield _Change("--page-optimizer yes", job, replace(fixed, pages_optimizer=True))


def _shorter(job: Job, fixed: Fixed) -> Iterator[_Change]:
    for length in _halvings(job.workload.longest_sequence, SHORTEST_LENGTH):
        yield _Change(f"--max-length {length}", replace(job, workload=shorten(job.workload, length)), fixed)


def _lower(job: Job, fixed: Fixed) -> Iterator[_Change]:
    for rank in _halvings(job.rank, LOWEST_RANK):
        yield _Change(f"--lora-r {rank}", replace(job, rank=rank), fixed)


def shorten(workload: Workload, max_length: int) -> Workload:
    """Return the workload with no sequence longer than `max_length`; a bound where lengths differ."""
    most = workload.effective_batch_size * max_length
    return replace(
        workload,
        longest_sequence=min(workload.longest_sequence, max_length),
        mean_step_tokens=min(workload.mean_step_tokens, most),
        max_step_tokens=min(workload.max_step_tokens, most),
        longest_validation=min(workload.longest_validation, max_length),
    )


def _halvings(value: int, least: int) -> list[int]:
    """Return the powers of two below a value, the largest first, down to `least`."""
    powers = []
    power = 1 << max(value - 1, 0).bit_length() - 1 if value > 1 else 0
    while power >= least:
        powers.append(power)
        power //= 2
    return powers


def _combine(job: Job, fixed: Fixed, execution: list[_Change], present: int) -> list[Remedy]:
    """Return the combination that fits with the fewest halvings; of equal ones that with the higher rank."""
    flags = [change.flags for change in execution]
    base = replace(job, can_page=True) if not job.can_page else job
    # All at once, each at its smallest.
    freed = Fixed(
        micro_batch_size=None if fixed.micro_batch_size is None else 1,
        num_recomputed=None if fixed.num_recomputed is None else job.shape.num_blocks,
        pages_optimizer=None if not job.can_page or fixed.pages_optimizer is None else True,
    )
    lengths = [None, *_halvings(job.workload.longest_sequence, SHORTEST_LENGTH)]
    ranks = [None, *_halvings(job.rank, LOWEST_RANK)]
    pairs = sorted(
        ((i, j) for i in range(len(lengths)) for j in range(len(ranks))), key=lambda pair: (sum(pair), pair[1])
    )

    def change(length: int | None, rank: int | None) -> _Change:
        changed = base if rank is None else replace(base, rank=rank)
        if length is not None:
            changed = replace(changed, workload=shorten(job.workload, length))
        own = [f"--max-length {length}"] * (length is not None) + [f"--lora-r {rank}"] * (rank is not None)
        return _Change(" ".join(flags + own), changed, freed)

    if not _judge(change(lengths[-1], ranks[-1]), present).fits:
        return []
    judged = (_judge(change(lengths[i], ranks[j]), present) for i, j in pairs)
    return [next(remedy for remedy in judged if remedy.fits)]
