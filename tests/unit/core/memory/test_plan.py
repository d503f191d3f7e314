"""The execution plan: of all that fit the fastest, always the same one, and smaller ones after a failure."""

import itertools
import random
from dataclasses import replace

import pytest

from dsft.core.memory.cards import H100, RTX_4090, Card, card_of_memory
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, ModelShape, read_model_shape
from dsft.core.memory.plan import (
    MARGIN_SHARE,
    ExecutionPlan,
    Fixed,
    Job,
    PlannedRun,
    Workload,
    assess,
    choose_plan,
    choose_smaller_plan,
    count_passes,
    describe_change,
    largest_micro_batch,
    make_plan,
    micro_batch_sizes,
    needed_bytes,
)
from dsft.core.memory.training import loading_holes_bytes
from dsft.core.units import GIB

CONFIG = BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"]
LARGE = read_model_shape(CONFIG, "6.7b")
SMALL = read_model_shape(CONFIG | {"num_hidden_layers": 5, "num_key_value_heads": 8}, "five blocks")

WORKLOADS = {
    "full": Workload.of_full_sequences(16, 1024),
    "long": Workload.of_full_sequences(4, 8192),
    "one": Workload.of_full_sequences(1, 512),
    "uneven": Workload(16, 4096, mean_step_tokens=5_000.5, max_step_tokens=20_000, longest_validation=6_000),
    "odd": Workload(11, 700, mean_step_tokens=4_000.0, max_step_tokens=7_000, longest_validation=300),
}


def job(
    workload: str | Workload = "full",
    budget_gib: float = 23.5,
    shape: ModelShape = SMALL,
    card: Card = RTX_4090,
    **rest: object,
) -> Job:
    work = WORKLOADS[workload] if isinstance(workload, str) else workload
    return Job(shape, 64, work, card, round(budget_gib * GIB), **rest)  # type: ignore[arg-type]


def all_runs(job: Job) -> list[PlannedRun]:
    """Every plan there can be, also with micro-batches that the search leaves out."""
    sizes = range(1, job.workload.effective_batch_size + 1)
    pages = (False, True) if job.can_page else (False,)
    choices = itertools.product(sizes, range(job.shape.num_blocks + 1), pages)
    return [assess(job, make_plan(job.workload, *choice)) for choice in choices]


def some_jobs() -> list[Job]:
    """Jobs of every kind, from too little memory to more than enough."""
    rng = random.Random(1)
    jobs = []
    for name in WORKLOADS:
        for _ in range(6):
            budget = rng.choice([0.8, 1.5, 2, 2.5, 3, 4, 6, 9, 15, 23.5])
            card = rng.choice([RTX_4090, card_of_memory(budget), H100])
            names = {"can_page": 0.7, "is_card_full": 0.7, "is_flash": 0.8, "uses_engine": 0.5}
            flags = {name: rng.random() < share for name, share in names.items()}
            jobs.append(replace(job(name, budget, card=card), rank=rng.choice([8, 16, 64]), **flags))  # type: ignore[arg-type]
    return jobs


def test_the_chosen_plan_fits_whenever_one_does_and_none_that_fits_is_faster() -> None:
    fitting = 0
    for each in some_jobs():
        chosen, runs = choose_plan(each), all_runs(each)
        assert chosen.fits == any(run.fits for run in runs)
        if chosen.fits:
            fitting += 1
            assert chosen.memory.least_process_bytes <= each.budget_bytes * (1 - MARGIN_SHARE)
            searched = micro_batch_sizes(each.workload)
            fastest = min(run.time.step_s for run in runs if run.fits and run.plan.micro_batch_size in searched)
            assert chosen.time.step_s <= fastest + 1e-4
        else:
            assert needed_bytes(each, chosen.memory) == min(needed_bytes(each, run.memory) for run in runs)
    assert 5 < fitting < len(some_jobs())  # both kinds are there


def test_no_micro_batch_size_that_the_search_leaves_out_is_faster() -> None:
    for each in some_jobs():
        fastest = min((run.time.step_s for run in all_runs(each) if run.fits), default=None)
        if fastest is not None:
            assert choose_plan(each).time.step_s <= fastest + 1e-4


def test_equal_inputs_give_equal_plans() -> None:
    for first, second in zip(some_jobs(), some_jobs(), strict=True):
        assert choose_plan(first) == choose_plan(second)


MUCH = 10**15


def take_literally(job: Job, size: int, *, recomputes: bool, pages: bool) -> PlannedRun:
    num_recomputed = job.shape.num_blocks if recomputes else 0
    return assess(job, make_plan(job.workload, size, num_recomputed, pages, by_tokens=False))


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("is_card_full", [True, False])
def test_more_memory_never_makes_the_step_longer(name: str, is_card_full: bool) -> None:
    runs = [choose_plan(job(name, 0.5 + 0.25 * step, card=H100, is_card_full=is_card_full)) for step in range(40)]
    assert not runs[0].fits and runs[-1].fits
    times = [run.time.step_s for run in runs if run.fits]
    for before, after in itertools.pairwise(times):
        assert after <= before + 1e-4
    assert times[-1] < times[0] or name == "one"
    fits = [run.fits for run in runs]
    assert fits == sorted(fits)  # what fits a card fits a larger one


def test_the_margin_is_kept_to_the_byte() -> None:
    needed = choose_plan(job("full", 100, card=H100), Fixed(4, 0, False)).memory.least_process_bytes
    budget = -(-needed * 100 // 97)  # 3 % of it are margin
    for num_bytes, fits in ((budget + 1, True), (budget - 100, False)):
        each = replace(job("full", card=H100), budget_bytes=num_bytes)
        assert choose_plan(each, Fixed(4, 0, False)).fits is fits


def test_where_the_card_has_more_than_the_budget_paged_state_counts() -> None:
    plan = make_plan(WORKLOADS["full"], 1, 5, True)
    memory = assess(job(card=H100), plan).memory
    state = memory.paged_bytes + memory.paged_out_bytes
    assert state > 100 * 1024**2
    between = (memory.least_process_bytes + state / 2) / (1 - MARGIN_SHARE) / GIB
    assert assess(job(budget_gib=between, is_card_full=True), plan).fits
    assert not assess(job(budget_gib=between, card=H100, is_card_full=False), plan).fits
    assert assess(job(budget_gib=between + state / GIB, card=H100, is_card_full=False), plan).fits


def test_state_that_has_no_room_costs_time() -> None:
    plan = make_plan(WORKLOADS["full"], 1, 5, True)
    ample, tight = (assess(job(budget_gib=gib, card=card_of_memory(gib)), plan) for gib in (20, 2.2))
    assert tight.memory.paged_out_bytes > 0 == ample.memory.paged_out_bytes
    assert tight.time.step_s > ample.time.step_s
    # The state stays on the device where there is room for it: nothing is gained by letting it page.
    assert not choose_plan(job(budget_gib=23.5)).plan.pages_optimizer


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_plan_changes_the_effective_batch(name: str) -> None:
    work = WORKLOADS[name]
    sizes = micro_batch_sizes(work)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] <= work.effective_batch_size
    for budget in (1.5, 3, 10, 100):
        plan = choose_plan(job(name, budget, card=H100)).plan
        assert 1 <= plan.micro_batch_size <= work.effective_batch_size
        assert 0 <= plan.num_recomputed <= SMALL.num_blocks
        assert plan.micro_batch_tokens == plan.micro_batch_size * work.longest_sequence


def test_micro_batch_sizes_are_the_smallest_for_each_number_of_passes() -> None:
    # 5 sequences at a time need as many passes over 16 as 4 do.
    assert micro_batch_sizes(WORKLOADS["full"]) == [1, 2, 3, 4, 6, 8, 16]
    assert micro_batch_sizes(WORKLOADS["one"]) == [1]
    assert micro_batch_sizes(Workload.of_full_sequences(11, 100)) == [1, 2, 3, 4, 6, 11]
    # 2 sequences of 4,096 tokens are more than an average step has.
    assert micro_batch_sizes(WORKLOADS["uneven"]) == [1, 2]
    assert len(micro_batch_sizes(Workload.of_full_sequences(1024, 512))) < 70


def test_a_micro_batch_has_at_least_the_longest_sequence_and_at_most_a_step() -> None:
    work = WORKLOADS["uneven"]
    tokens = [largest_micro_batch(work, make_plan(work, size, 0, False)) for size in (1, 2, 4, 8, 16)]
    assert tokens == [4096, 8192, 16_384, 20_000, 20_000]
    shorter = ExecutionPlan(1, 100, True, 0, False, 100)
    assert largest_micro_batch(work, shorter) == 4096


def test_validation_passes_are_no_larger_than_micro_batches_but_for_long_samples() -> None:
    for name, work in WORKLOADS.items():
        for size, by_tokens in itertools.product(micro_batch_sizes(work), (True, False)):
            plan = make_plan(work, size, 0, False, by_tokens=by_tokens)
            assert plan.validation_tokens <= largest_micro_batch(work, plan), (name, plan)
    # A validation sample that is longer than all of training raises the peak where nothing else is larger.
    work = replace(WORKLOADS["full"], longest_validation=200_000)
    plan = make_plan(work, 1, SMALL.num_blocks, False)
    longer, usual = assess(job(work), plan).memory, assess(job("full"), plan).memory
    assert longer.peak_moment == "a validation pass" and longer.allocated_bytes > usual.allocated_bytes


# What the user decides


@pytest.mark.parametrize(
    "fixed",
    [Fixed(2), Fixed(num_recomputed=3), Fixed(pages_optimizer=True), Fixed(pages_optimizer=False), Fixed(4, 0, True)],
)
@pytest.mark.parametrize("budget_gib", [1, 2.5, 6])
def test_what_the_user_decides_is_kept_in_every_plan(fixed: Fixed, budget_gib: float) -> None:
    def assert_kept(plan: ExecutionPlan) -> None:
        assert fixed.micro_batch_size in (None, plan.micro_batch_size)
        assert fixed.num_recomputed in (None, plan.num_recomputed)
        assert fixed.pages_optimizer in (None, plan.pages_optimizer)

    each = job(budget_gib=budget_gib)
    run: PlannedRun | None = choose_plan(each, fixed)
    while run is not None:
        assert_kept(run.plan)
        run = choose_smaller_plan(each, run.plan, MUCH, fixed)


def test_more_blocks_than_there_are_means_all() -> None:
    assert choose_plan(job(), Fixed(num_recomputed=99)).plan.num_recomputed == SMALL.num_blocks


def test_an_optimizer_that_cannot_page_is_not_asked_to() -> None:
    for budget in (1, 2, 3):
        assert not choose_plan(job(budget_gib=budget, can_page=False)).plan.pages_optimizer


@pytest.mark.parametrize(("recomputes", "expected"), [(True, 5), (False, 0)])
def test_settings_can_be_taken_literally(recomputes: bool, expected: int) -> None:
    run = take_literally(job("uneven"), 3, recomputes=recomputes, pages=True)
    assert run.plan == ExecutionPlan(3, 3 * 4096, False, expected, True, 4096)
    assert not take_literally(job("uneven", 1), 3, recomputes=False, pages=False).fits


# After a failure


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("can_page", [True, False])
def test_smaller_plans_shrink_strictly_and_end(name: str, can_page: bool) -> None:
    each = job(name, 60, card=H100, can_page=can_page)
    run = choose_plan(each)
    needed = [run.memory.least_process_bytes]
    seen = {run.plan}
    while (smaller := choose_smaller_plan(each, run.plan, MUCH)) is not None:
        run = smaller
        needed.append(run.memory.least_process_bytes)
        assert run.plan not in seen
        seen.add(run.plan)
    assert needed == sorted(set(needed), reverse=True)
    assert 1 < len(needed) < 60
    # The last one is the smallest there is.
    assert needed[-1] == min(r.memory.least_process_bytes for r in all_runs(each))
    assert choose_smaller_plan(each, run.plan, MUCH) is None


def test_a_smaller_plan_gives_back_a_tenth_of_the_activations() -> None:
    each = job("full", 60, card=H100)
    before = choose_plan(each)
    after = choose_smaller_plan(each, before.plan, MUCH)
    assert after is not None
    activations = before.memory.step_bytes
    freed = before.memory.least_process_bytes - after.memory.least_process_bytes
    assert freed >= round(0.1 * activations)
    # And of all that give so much back it is the fastest.
    enough = before.memory.least_process_bytes - round(0.1 * activations)
    searched = micro_batch_sizes(each.workload)
    others = [
        run.time.step_s
        for run in all_runs(each)
        if run.memory.least_process_bytes <= enough and run.plan.micro_batch_size in searched
    ]
    assert after.time.step_s <= min(others) + 1e-4


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_a_smaller_plan_fits_what_is_free(share: float) -> None:
    each = job("full", 60, card=H100)
    before = choose_plan(each)
    free_bytes = round(share * before.memory.step_bytes)
    after = choose_smaller_plan(each, before.plan, free_bytes)
    assert after is not None
    assert after.memory.step_bytes <= free_bytes
    # Nothing that fits is faster: what loading has left between the weights and every plan's margin are no room.
    usable_bytes = free_bytes - loading_holes_bytes(each.shape) - (each.budget_bytes - each.allowed_bytes)
    assert after.memory.step_bytes <= usable_bytes
    others = [run.time.step_s for run in all_runs(each) if run.memory.step_bytes <= usable_bytes]
    assert after.time.step_s <= min(others) * 1.02 + 1e-4


def test_where_nothing_fits_what_is_free_the_smallest_is_tried() -> None:
    each = job("full", 60, card=H100)
    after = choose_smaller_plan(each, choose_plan(each).plan, 0)
    assert after is not None
    assert after.memory.least_process_bytes == min(run.memory.least_process_bytes for run in all_runs(each))


@pytest.mark.parametrize("is_card_full", [True, False])
def test_state_that_pages_never_comes_back_in_mid_run(is_card_full: bool) -> None:
    each = job("full", 60, card=H100, is_card_full=is_card_full)
    failed = replace(choose_plan(each).plan, pages_optimizer=True)
    while (smaller := choose_smaller_plan(each, failed, MUCH)) is not None:
        assert smaller.plan.pages_optimizer
        failed = smaller.plan


def test_on_a_card_with_more_than_the_budget_paging_saves_nothing() -> None:
    each = job("full", 20, card=H100, is_card_full=False)
    run = choose_plan(each)
    while (smaller := choose_smaller_plan(each, run.plan, MUCH)) is not None:
        assert smaller.memory.most_process_bytes < run.memory.most_process_bytes
        run = smaller


def test_passes_are_counted_as_the_plan_splits() -> None:
    short = Workload(effective_batch_size=16, longest_sequence=4096, mean_step_tokens=300 * 16, max_step_tokens=9000)
    assert count_passes(short, make_plan(short, 1, 0, False, by_tokens=False)) == 16
    assert count_passes(short, make_plan(short, 3, 0, False, by_tokens=False)) == 6
    assert count_passes(short, make_plan(short, 1, 0, False)) == 2
    assert count_passes(short, make_plan(short, 2, 0, False)) == 1


def test_what_changes_is_said() -> None:
    plan = make_plan(WORKLOADS["full"], 4, 2, False)
    assert describe_change(plan, plan) == ""
    smaller = make_plan(WORKLOADS["full"], 2, 5, True)
    assert describe_change(plan, smaller) == (
        "micro-batches of up to 2,048 tokens, not 4,096; 5 blocks recompute, not 2; "
        "the optimizer state can page to host memory"
    )
    assert describe_change(smaller, plan).endswith("the optimizer state stays on the device")


# DeepSeek-Coder 6.7B on a 24 GB card


@pytest.mark.parametrize(("max_length", "batch"), [(1024, 16), (2048, 8), (4096, 4)])
def test_deepseek_coder_fits_an_rtx_4090(max_length: int, batch: int) -> None:
    usable_gib = (RTX_4090.usable_bytes) / GIB
    run = choose_plan(job(Workload.of_full_sequences(batch, max_length), usable_gib, shape=LARGE))
    assert run.fits
    assert run.memory.device_bytes <= RTX_4090.total_bytes  # state that pages takes what is left
    literal = take_literally(
        job(Workload.of_full_sequences(batch, max_length), usable_gib, shape=LARGE), 1, recomputes=True, pages=True
    )
    assert run.time.step_s < literal.time.step_s
