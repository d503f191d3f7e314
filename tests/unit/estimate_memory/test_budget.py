"""What an estimate plans for: the flags, the GPU that is there with what others use of it, or an RTX 4090."""

import re
from pathlib import Path

import pytest

from dsft.core.errors import ConfigError
from dsft.core.memory.cards import CARDS, H100, MIB, RTX_4090, find_card
from dsft.core.units import GIB
from dsft.estimate_memory.budget import choose_budget
from dsft.estimate_memory.device import read_gpu_zero
from tests.unit.estimate_memory.estimates import FakeDriver, install

FIRST = {
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-a",
    "total": H100.total_bytes,
    "used": 20 * GIB,
    "capability": (9, 0),
    "cores": 132 * 128,
}
SECOND = {
    "name": "NVIDIA Unheard Of",
    "uuid": "GPU-b",
    "total": 20 * GIB,
    "used": GIB,
    "capability": (8, 0),
    "cores": 64 * 64,
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return install(monkeypatch, FakeDriver(FIRST, SECOND))


@pytest.mark.usefixtures("driver")
def test_flags_come_before_the_gpu_that_is_there() -> None:
    named = choose_budget(None, "rtx 3090")
    assert (named.card, named.origin, named.budget_bytes) == (
        find_card("RTX 3090"),
        "gpu",
        find_card("RTX 3090").usable_bytes,
    )
    sized = choose_budget(12, None)
    assert (sized.card.total_bytes, sized.origin) == (12 * GIB, "vram")
    assert sized.budget_bytes == sized.card.usable_bytes < 12 * GIB


def test_the_gpu_that_is_there_gives_what_is_free_of_it(driver: FakeDriver) -> None:
    budget = choose_budget(None, None)
    assert budget.origin == "device"
    assert budget.budget_bytes == H100.total_bytes - 20 * GIB
    assert budget.card.context_bytes == H100.context_bytes
    assert budget.card.is_measured
    assert driver.num_open == 0


@pytest.mark.parametrize(("visible", "name"), [("1", "NVIDIA Unheard Of"), ("GPU-b,0", "NVIDIA Unheard Of")])
def test_the_first_visible_gpu_counts(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, visible: str, name: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = read_gpu_zero()
    assert gpu is not None
    assert (gpu.name, gpu.multiprocessors, gpu.capability) == (name, 64, (8, 0))
    assert choose_budget(None, None).budget_bytes == 19 * GIB


@pytest.mark.parametrize("visible", ["", "-1", "7", "GPU-z"])
def test_hidden_gpus_are_not_there(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert read_gpu_zero() is None
    assert driver.num_open == 0


def test_without_a_driver_an_rtx_4090_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver())
    budget = choose_budget(None, None)
    assert (budget.card, budget.origin) == (RTX_4090, "default")


def test_an_old_driver_that_counts_no_cores_is_no_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeDriver(SECOND, counts_cores=False))
    budget = choose_budget(None, None)
    assert (budget.origin, budget.budget_bytes) == ("device", 19 * GIB)


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(ConfigError, match="no card dsft knows"):
        choose_budget(None, "Voodoo 2")


def test_the_documented_cards_are_the_known_ones(repository: Path) -> None:
    text = (repository / "docs" / "memory.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| .* \| (?:measured|scaled) \|$", text, flags=re.MULTILINE)
    assert documented == [
        f"| {card.name} | {card.total_bytes // MIB:,} | {card.usable_bytes / GIB:.1f} | {card.context_bytes / MIB:.0f} "
        f"| {card.capability[0]}.{card.capability[1]} | {card.matmul_flops / 1e12:g} | {card.bandwidth / 1e9:g} "
        f"| {'measured' if card.is_measured else 'scaled'} |"
        for card in CARDS
    ]
