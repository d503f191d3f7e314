"""Plans in words: every difference from the settings as written is named, and nothing that is none."""

from dataclasses import replace

import pytest

from dsft.core.memory.cards import RTX_4090
from dsft.core.memory.explain import describe_lack, explain_misfit, explain_plan, explain_recompute, micro_batch_size
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, read_model_shape
from dsft.core.memory.plan import Job, PlannedRun, Workload, assess, make_plan, needed_bytes
from dsft.core.memory.speed import StepTime
from dsft.core.units import GIB

SHAPE = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7b")
JOB = Job(SHAPE, 64, Workload.of_full_sequences(16, 1024), RTX_4090, RTX_4090.usable_bytes)
WRITTEN = assess(JOB, make_plan(JOB.workload, 1, SHAPE.num_blocks, True, by_tokens=False))


def make_run(*, step_s: float, more_bytes: int = 0, **changes: object) -> PlannedRun:
    memory = replace(WRITTEN.memory, reserved_bytes=WRITTEN.memory.reserved_bytes + more_bytes)
    return PlannedRun(replace(WRITTEN.plan, **changes), memory, StepTime(step_s, False), fits=True)


@pytest.mark.parametrize(
    ("changes", "times_faster", "more_bytes", "words"),
    [
        (
            {"micro_batch_size": 4, "num_recomputed": 9},
            2.1,
            round(6.2 * GIB),
            "micro-batch 4 instead of 1: 2.1x faster, +6.2 GiB; 9 of 32 blocks recompute",
        ),
        (
            {"num_recomputed": 0, "pages_optimizer": False},
            1.5,
            GIB,
            "micro-batch 1 as written: 1.5x faster, +1.0 GiB; no block recomputes; optimizer state on the device",
        ),
        (
            {"micro_batch_size": 2},
            0.5,
            -2 * GIB,
            "micro-batch 2 instead of 1: 2.0x slower, -2.0 GiB; all 32 blocks recompute",
        ),
        (
            {"micro_batch_size": 2},
            1.02,
            1000,
            "micro-batch 2 instead of 1: as fast, in the same memory; all 32 blocks recompute",
        ),
        ({}, 1.0, 0, "as written: micro-batch 1; all 32 blocks recompute"),
    ],
)
def test_a_plan_is_told_against_the_settings_as_written(
    changes: dict[str, object], times_faster: float, more_bytes: int, words: str
) -> None:
    run = make_run(step_s=WRITTEN.time.step_s / times_faster, more_bytes=more_bytes, **changes)
    assert explain_plan(JOB, run, WRITTEN) == words


def test_an_optimizer_state_that_is_paged_only_now_is_named() -> None:
    written = replace(WRITTEN, plan=replace(WRITTEN.plan, pages_optimizer=False))
    assert explain_plan(JOB, WRITTEN, written).endswith("; optimizer state paged")


def test_a_micro_batch_is_no_larger_than_the_effective_batch() -> None:
    assert micro_batch_size(JOB, make_run(step_s=1, micro_batch_size=64).plan) == 16
    assert micro_batch_size(JOB, make_run(step_s=1, micro_batch_size=3).plan) == 3


def test_recompute_in_words() -> None:
    assert [explain_recompute(number, 4) for number in (0, 1, 4)] == [
        "no block recomputes",
        "1 of 4 blocks recompute",
        "all 4 blocks recompute",
    ]


def test_a_misfit_names_need_lack_and_limit() -> None:
    job = replace(JOB, budget_bytes=10 * GIB)  # 9.7 GiB may be taken
    memory = replace(WRITTEN.memory, reserved_bytes=12 * GIB, context_bytes=GIB)
    run = replace(WRITTEN, memory=memory)
    assert explain_misfit(job, run) == "needs 13.0 GiB, 3.3 GiB more than the 9.7 GiB a plan may take"


@pytest.mark.parametrize(
    ("need_gib", "room_gib", "told"),
    [
        (23.06, 22.84, ("23.06 GiB", "0.22 GiB", "22.84 GiB")),  # one decimal: 23.1, 0.2 and 22.8
        (6.24, 4.76, ("6.2 GiB", "1.4 GiB", "4.8 GiB")),  # the difference itself is 1.48
        (5.0, 4.9999, ("5.0000 GiB", "0.0001 GiB", "4.9999 GiB")),
    ],
)
def test_figures_of_a_lack_agree(need_gib: float, room_gib: float, told: tuple[str, str, str]) -> None:
    assert describe_lack(round(need_gib * GIB), round(room_gib * GIB)) == told


def test_paged_state_counts_only_where_the_card_has_room_for_it() -> None:
    memory = replace(
        WRITTEN.memory, reserved_bytes=5 * GIB, context_bytes=GIB, paged_bytes=2 * GIB, paged_out_bytes=3 * GIB
    )
    assert needed_bytes(JOB, memory) == 6 * GIB
    assert needed_bytes(replace(JOB, is_card_full=False), memory) == 11 * GIB
