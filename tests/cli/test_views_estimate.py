"""The estimate's tables: at any width and in any encoding nothing is cut, and every figure is there."""

import io
import re

import pytest
from rich.console import Console, RenderableType

from dsft.cli.views.breakdown import render_breakdown
from dsft.cli.views.estimate import GIVES_WAY_NOTE, describe_split, render_comparison
from dsft.core.memory.cards import H100, RTX_4090, card_of_memory
from dsft.core.units import GIB
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.result import Breakdown
from dsft.estimate_memory.run import break_down, compare_presets
from tests.unit.estimate_memory.estimates import BUDGET, configure

WIDTHS = [60, 80, 100, 120, 200]
EIGHT_GIB = Budget(card_of_memory(8), "vram")


def draw(renderable: RenderableType, width: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, markup=False, highlight=False).print(renderable, crop=False)
    file.seek(0)
    return file.read().splitlines()


def words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


@pytest.fixture(scope="module")
def misfit() -> Breakdown:
    return break_down(configure(plan="off", gradient_checkpointing=False), EIGHT_GIB)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_comparison_shows_every_figure(width: int) -> None:
    result = compare_presets(BUDGET)
    lines = draw(render_comparison(result), width)
    assert max(map(len, lines)) <= width
    rows = {line[:21].strip(): line[21:].split() for line in lines if line.strip()}
    memory = [preset.planned.chosen.memory for preset in result.presets]
    assert rows["preset"] == ["conservative", "balanced", "quality"]
    assert rows["longest sample"] == ["512", "1,024", "2,048"]
    assert rows["LoRA rank"] == ["32", "64", "128"]
    assert rows["effective batch"] == ["8", "16", "32"]
    assert rows["GiB of the process"] == [f"{each.process_bytes / GIB:.1f}" for each in memory]
    assert rows["GiB on the device"] == [f"{each.device_bytes / GIB:.1f}" for each in memory]
    assert rows["tok/s"] == [f"{preset.planned.tok_per_s:,.0f}" for preset in result.presets]
    assert rows["speed-up"] == [f"{preset.planned.speed_up:.1f}×" for preset in result.presets]
    assert rows["fits"] == ["yes", "yes", "yes"]
    assert rows["seed document, GB"] == ["~18", "~20", "~22"]
    for preset in result.presets:
        assert f"{preset.name}: {preset.explanation}" in words(lines)
    assert result.notices[0] in words(lines)


def test_what_does_not_fit_is_marked_without_colour() -> None:
    lines = draw(render_comparison(compare_presets(Budget(card_of_memory(4), "vram"))), 80)
    (row,) = (line for line in lines if line.startswith("fits "))
    assert row.split()[1:] == ["no", "no", "no"]


@pytest.mark.parametrize("width", WIDTHS)
def test_what_fits_only_because_its_paged_state_leaves_has_a_footnote(width: int) -> None:
    six_gib = Budget(card_of_memory(6), "vram")
    result = compare_presets(six_gib)
    planned = result.presets[0].planned
    assert planned.chosen.memory.least_process_bytes <= planned.job.allowed_bytes < planned.chosen.memory.process_bytes
    lines = draw(render_comparison(result), width)
    (row,) = (line for line in lines if line.startswith("fits "))
    assert row.split()[1:] == ["yes*", "no", "no"]
    assert f"* {GIVES_WAY_NOTE}" in words(lines)
    text = words(draw(render_breakdown(break_down(result.presets[0].config, six_gib)), width))
    needed, allowed = (size / GIB for size in (planned.chosen.memory.least_process_bytes, planned.job.allowed_bytes))
    assert f"fits yes*, {needed:.1f} GiB of {allowed:.1f} GiB without its paged state" in text
    assert f"* {GIVES_WAY_NOTE}" in text


def test_what_has_room_for_its_paged_state_has_no_footnote() -> None:
    for renderable in (render_comparison(compare_presets(BUDGET)), render_breakdown(break_down(configure(), BUDGET))):
        assert "*" not in words(draw(renderable, 100))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_breakdown_shows_every_term_with_its_formula(width: int) -> None:
    result = break_down(configure(), BUDGET)
    lines = draw(render_breakdown(result), width)
    assert max(map(len, lines)) <= width
    text = words(lines)
    for term in result.planned.chosen.memory.terms:
        (line,) = (line for line in lines if line.startswith(f"  {term.name}  "))
        gib = term.num_bytes / GIB
        assert (f" {gib:.2f} GiB " if gib >= 0.01 else f" {gib * 1024:.2f} MiB ") in line
        assert all(word in text for word in term.formula.split())
        if width < 108:
            assert term.formula in text
    for group in ("weights", "LoRA", "activations", "overhead"):
        members = [term.num_bytes for term in result.planned.chosen.memory.terms if term.group == group]
        (line,) = (line for line in lines if re.match(rf"{group} +\d+\.\d\d GiB +\d+ %$", line.rstrip()))
        assert f" {sum(members) / GIB:.2f} GiB " in line
    memory = result.planned.chosen.memory
    for num_bytes in (memory.allocated_bytes, memory.reserved_bytes, memory.process_bytes, memory.device_bytes):
        assert f" {num_bytes / GIB:.1f} GiB" in text
    assert result.explanation in text
    for name, generation in result.generation.items():
        assert f"{name} {generation.process_bytes / GIB:.1f} GiB" in text
    for term in result.host.disk:
        assert f"{term.name} " in text


def test_bars_are_as_long_as_their_shares() -> None:
    result = break_down(configure(), BUDGET)
    memory = result.planned.chosen.memory
    lines = draw(render_breakdown(result), 80)
    for term in memory.terms:
        (line,) = (line for line in lines if line.startswith(f"  {term.name}  "))
        halves = 2 * line.count("━") + line.count("╸")
        assert halves == round(28 * term.num_bytes / memory.device_bytes)


@pytest.mark.parametrize("width", WIDTHS)
def test_remedies_are_drawn_unless_the_error_tells_them(misfit: Breakdown, width: int) -> None:
    lines = draw(render_breakdown(misfit), width)
    assert max(map(len, lines)) <= width
    for remedy in misfit.remedies:
        (line,) = (line for line in lines if line.startswith(f"  {remedy.change} "))
        assert f"saves {remedy.saved_bytes / GIB:.1f} GiB, {'fits' if remedy.fits else 'not enough'}" in line
    without = draw(render_breakdown(misfit, has_remedies=False), width)
    assert "What would make it fit" not in words(without)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_without_unicode_nothing_moves(misfit: Breakdown, encoding: str) -> None:
    for renderable in (render_comparison(compare_presets(BUDGET)), render_breakdown(misfit)):
        plain, rich = draw(renderable, 80, encoding), draw(renderable, 80)
        assert [len(line) for line in plain] == [len(line) for line in rich]
        assert not any("?" in line for line in plain)


@pytest.mark.parametrize(
    ("budget", "head"),
    [
        (Budget(RTX_4090, "default"), "no GPU here: planned for an RTX 4090, 23.5 GiB usable of 24,564 MiB"),
        (Budget(RTX_4090, "gpu"), "planned for the RTX 4090, 23.5 GiB usable of 24,564 MiB"),
        (Budget(RTX_4090, "device"), "planned for GPU 0, RTX 4090: 23.5 GiB free of 24,564 MiB"),
        (EIGHT_GIB, "planned for a card of 8 GiB, 7.8 GiB of it usable, otherwise like an RTX 4090"),
    ],
)
def test_the_head_says_what_is_planned_for_and_what_is_free(budget: Budget, head: str) -> None:
    text = words(draw(render_comparison(compare_presets(budget)), 80))
    allowed = budget.budget_bytes * 0.97 / GIB
    assert f"{head}; a plan may take {allowed:.1f} GiB, 3 % stay free" in text
    assert "is predicted" in text
    assert "from an H100's and the card's data sheet" in text


def test_the_measured_card_has_a_speed_of_its_own() -> None:
    text = words(draw(render_comparison(compare_presets(Budget(H100, "gpu"))), 80))
    assert "data sheet" not in text


def test_state_in_host_memory_and_the_last_micro_batch_are_told() -> None:
    result = break_down(configure(lora_r=256, gradient_accumulation_steps=5, micro_batch=2), EIGHT_GIB)
    assert result.planned.chosen.memory.paged_out_bytes > 0
    text = words(draw(render_breakdown(result), 100))
    assert f"in host memory {result.planned.chosen.memory.paged_out_bytes / GIB:.1f} GiB" in text
    assert describe_split(result.planned) == "2 × 3"


def test_a_tiny_model_s_terms_are_not_all_nought() -> None:
    text = words(draw(render_breakdown(break_down(configure(model_name="builtin:tiny/model"), BUDGET)), 100))
    assert "MiB" in text
    assert " 0.00 GiB" not in text
