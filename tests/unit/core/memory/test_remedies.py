"""What would make a run fit: every remedy is tried against the planner itself, and they come in their order."""

from dataclasses import replace
from itertools import pairwise

import pytest

from dsft.core.memory.cards import card_of_memory
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, read_model_shape
from dsft.core.memory.plan import Fixed, Job, Workload, choose_plan, needed_bytes
from dsft.core.memory.remedies import Remedy, find_remedies, least_budget_bytes, shorten

SHAPE = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-1.3b-base"], "1.3b")


def make_job(vram_gib: float, *, rank: int = 64, max_length: int = 2048, batch: int = 4, **changes: object) -> Job:
    card = card_of_memory(vram_gib)
    job = Job(SHAPE, rank, Workload.of_full_sequences(batch, max_length), card, card.usable_bytes)
    return replace(job, **changes)


def budget_job(job: Job, budget_bytes: int) -> Job:
    return replace(job, budget_bytes=budget_bytes)


def apply(job: Job, fixed: Fixed, change: str) -> tuple[Job, Fixed]:
    """Read a remedy's flags as the command would."""
    words = change.split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        match flag:
            case "--max-length":
                workload = Workload.of_full_sequences(job.workload.effective_batch_size, int(value))
                job = replace(job, workload=workload)
            case "--lora-r":
                job = replace(job, rank=int(value))
            case "--recompute-blocks":
                fixed = replace(fixed, num_recomputed=int(value))
            case "--micro-batch":
                fixed = replace(fixed, micro_batch_size=int(value))
            case "--page-optimizer":
                assert value == "yes"
                fixed = replace(fixed, pages_optimizer=True)
            case "--optimizer":
                assert value == "paged_adamw_32bit"
                job, fixed = replace(job, can_page=True), replace(fixed, pages_optimizer=None)
            case _:
                raise AssertionError(change)
    return job, fixed


def test_a_run_that_fits_needs_no_remedy() -> None:
    assert find_remedies(make_job(24)) == []


DECISIONS = [
    Fixed(),
    Fixed(num_recomputed=0),
    Fixed(micro_batch_size=4),
    Fixed(micro_batch_size=4, num_recomputed=3, pages_optimizer=False),
]


@pytest.mark.parametrize("fixed", DECISIONS)
@pytest.mark.parametrize("share", [0.98, 0.8, 0.6])
@pytest.mark.parametrize("can_page", [True, False])
def test_what_is_said_to_fit_does_and_the_rest_does_not(fixed: Fixed, share: float, can_page: bool) -> None:
    job = make_job(24, can_page=can_page)
    if not can_page:
        fixed = replace(fixed, pages_optimizer=False)
    job = budget_job(job, round(share * least_budget_bytes(job, fixed)))
    remedies = find_remedies(job, fixed)
    assert remedies
    for remedy in remedies:
        changed_job, changed = apply(job, fixed, remedy.change)
        assert choose_plan(changed_job, changed).fits == remedy.fits, remedy
        smallest = choose_plan(budget_job(changed_job, 0), changed)
        now = choose_plan(budget_job(job, 0), fixed)
        saved = needed_bytes(job, now.memory) - needed_bytes(changed_job, smallest.memory)
        assert remedy.saved_bytes == saved > 0
    if not any(remedy.fits for remedy in remedies):
        hopeless, changed = apply(job, Fixed(), "--max-length 128 --lora-r 8 --optimizer paged_adamw_32bit")
        assert not choose_plan(hopeless, changed).fits


def kind(remedy: Remedy) -> int:
    return {"--max-length": 1, "--lora-r": 2}.get(remedy.change.split()[0], 0)


def test_execution_comes_before_length_and_length_before_rank() -> None:
    fixed = Fixed(micro_batch_size=4, num_recomputed=0, pages_optimizer=False)
    job = make_job(24)
    job = budget_job(job, round(0.97 * least_budget_bytes(job, fixed)))
    remedies = find_remedies(job, fixed)
    flags = [remedy.change.split()[0] for remedy in remedies]
    assert {"--recompute-blocks", "--micro-batch", "--page-optimizer", "--max-length", "--lora-r"} == set(flags)
    assert [kind(remedy) for remedy in remedies] == sorted(kind(remedy) for remedy in remedies)


def test_lengths_and_ranks_are_halved_until_one_fits() -> None:
    job = make_job(24)
    short = replace(job, workload=Workload.of_full_sequences(4, 512))
    job = budget_job(job, least_budget_bytes(short))
    remedies = [remedy for remedy in find_remedies(job) if remedy.change.startswith("--max-length")]
    assert [remedy.change for remedy in remedies] == ["--max-length 1024", "--max-length 512"]
    assert [remedy.fits for remedy in remedies] == [False, True]
    assert all(before.saved_bytes < after.saved_bytes for before, after in pairwise(remedies))


def test_as_few_blocks_recompute_as_are_enough() -> None:
    job, fixed = make_job(24), Fixed(num_recomputed=2)
    job = budget_job(job, least_budget_bytes(job, Fixed(num_recomputed=7)))
    assert find_remedies(job, fixed)[0].change == "--recompute-blocks 7"


def test_a_combination_is_named_only_where_nothing_is_enough_alone() -> None:
    job = make_job(24, rank=128)
    target = replace(job, rank=32, workload=Workload.of_full_sequences(4, 512))
    tight = budget_job(job, least_budget_bytes(target))
    remedies = find_remedies(tight)
    fitting = [remedy for remedy in remedies if remedy.fits]
    alone = [remedy for remedy in remedies if len(remedy.change.split()) == 2]
    assert fitting == [remedies[-1]]
    assert not any(remedy.fits for remedy in alone)
    words = remedies[-1].change.split()
    assert words[::2] == ["--max-length", "--lora-r"]
    # No milder pair of those values would do.
    length, rank = int(words[1]), int(words[3])
    for milder_length, milder_rank in ((2 * length, rank), (length, 2 * rank)):
        milder, _ = apply(tight, Fixed(), f"--max-length {milder_length} --lora-r {milder_rank}")
        assert not choose_plan(milder).fits


def test_without_hope_there_is_no_combination() -> None:
    remedies = find_remedies(make_job(1))
    assert remedies
    assert not any(remedy.fits for remedy in remedies)
    assert all(len(remedy.change.split()) == 2 for remedy in remedies)


def test_the_least_budget_is_one_that_fits_and_hardly_more() -> None:
    job = make_job(24)
    least = least_budget_bytes(job)
    assert choose_plan(budget_job(job, least)).fits
    assert not choose_plan(budget_job(job, round(0.999 * least))).fits


def test_a_shorter_length_bounds_what_is_longer_and_leaves_the_rest() -> None:
    workload = Workload(8, 700, 2000.0, 4000, 900)
    assert shorten(workload, 256) == Workload(8, 256, 2000.0, 2048, 256)
    assert shorten(workload, 1000) == workload
