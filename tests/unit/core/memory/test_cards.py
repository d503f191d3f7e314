"""Records of cards, and the names they are found by."""

import pytest

from dsft.core.errors import ConfigError
from dsft.core.memory.cards import (
    CARDS,
    H100,
    RTX_4090,
    card_of_device,
    card_of_memory,
    find_card,
    recognize_card,
    workspace_bytes,
)
from dsft.core.units import GIB

MIB = 1024**2


@pytest.mark.parametrize(
    "name", ["4090", "rtx 4090", "RTX-4090", "NVIDIA GeForce RTX 4090", "geforce rtx 4090", " RTX  4090 "]
)
def test_a_card_is_found_by_the_names_people_write(name: str) -> None:
    assert find_card(name) is RTX_4090


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_and_recognized_by_its_own_name(card) -> None:
    assert find_card(card.name) is card
    assert find_card(card.name.lower()) is card
    assert recognize_card(f"NVIDIA {card.name}") is card


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtx 3090", "RTX 3090"),  # and not the Ti
        ("3090", "RTX 3090"),
        ("4070", "RTX 4070"),
        ("h100", "H100 80GB HBM3"),
        ("A6000", "RTX A6000"),
        ("t4", "T4"),
        ("6000 ada", "RTX 6000 Ada"),
        ("4060 ti", "RTX 4060 Ti 16GB"),
    ],
)
def test_part_of_a_name_is_enough_where_it_fits_one_card(name: str, expected: str) -> None:
    assert find_card(name).name == expected


@pytest.mark.parametrize("name", ["a100", "rtx", "ti"])
def test_part_of_several_names_is_refused_with_those_it_fits(name: str) -> None:
    with pytest.raises(ConfigError, match="can be several cards") as caught:
        find_card(name)
    meant = caught.value.fix.removeprefix("Take one of: ").partition(";")[0].split(", ")
    assert set(meant) == {card.name for card in CARDS if name in card.name.lower().split()}
    assert len(meant) >= 2


@pytest.mark.parametrize("name", ["", " ", "nvidia", "rtx 9999", "gtx 1080 ti", "radeon rx 7900", "40"])
def test_a_card_without_a_record_is_refused_with_all_that_have_one(name: str) -> None:
    with pytest.raises(ConfigError, match="no card dsft knows") as caught:
        find_card(name)
    assert all(card.name in caught.value.fix for card in CARDS)
    assert "--vram" in caught.value.fix


def test_a_mistyped_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"did you mean RTX 4090\?"):
        find_card("rtx 409O")


def test_the_driver_names_are_recognized_whole() -> None:
    assert recognize_card("NVIDIA GeForce RTX 4090") is RTX_4090
    assert recognize_card("NVIDIA H100 80GB HBM3") is H100
    assert recognize_card("Tesla T4") is find_card("T4")
    assert recognize_card("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert recognize_card("NVIDIA GeForce RTX 4090 D") is None
    assert recognize_card("") is None


def test_the_rtx_4090_has_the_usable_memory_of_its_record() -> None:
    assert RTX_4090.total_bytes == 24_564 * MIB
    assert RTX_4090.usable_bytes / GIB == pytest.approx(23.5, abs=0.05)
    assert RTX_4090.capability == (8, 9)
    assert not RTX_4090.is_measured


def test_names_are_unique_and_every_record_is_sane() -> None:
    assert len({card.name.lower() for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert 0 < card.driver_bytes < 0.05 * card.total_bytes, card
        assert 200 * MIB < card.context_bytes < 1024 * MIB, card
        assert 5e13 < card.matmul_flops <= 989e12 and 2e11 < card.bandwidth < 6e12, card
        assert card.usable_bytes == card.total_bytes - card.driver_bytes
    assert [card.name for card in CARDS if card.is_measured] == [H100.name]


def test_a_card_given_by_its_memory_keeps_the_4090s_share_for_the_driver() -> None:
    card = card_of_memory(24)
    assert card.total_bytes == 24 * GIB
    assert card.usable_bytes / card.total_bytes == pytest.approx(RTX_4090.usable_bytes / RTX_4090.total_bytes)
    assert (card.context_bytes, card.capability) == (RTX_4090.context_bytes, RTX_4090.capability)
    assert card_of_memory(7.5).name == "a card of 7.5 GiB"


@pytest.mark.parametrize(
    ("capability", "mib"),
    [((7, 5), 16.25), ((8, 6), 16.25), ((8, 9), 16.25), ((9, 0), 64), ((10, 0), 64), ((12, 0), 16.25)],
)
def test_cublas_has_a_workspace_for_each_thread(capability: tuple[int, int], mib: float) -> None:
    assert workspace_bytes(capability) == mib * MIB


@pytest.mark.parametrize(
    ("device", "total_mib", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 40960, "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100 80GB"),
        ("NVIDIA H100 PCIe", 81559, None),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("NVIDIA GeForce RTX 4090 D", 24564, None),
        ("NVIDIA GeForce RTX 3080", 12288, None),
        ("NVIDIA A10G", 23028, None),
    ],
)
def test_the_drivers_names_are_recognized(device: str, total_mib: int, expected: str | None) -> None:
    card = recognize_card(device, total_mib * 1024**2)
    assert (card.name if card else None) == expected


def test_an_unknown_card_is_scaled_from_one_of_its_kind() -> None:
    card = card_of_device("NVIDIA H100 NVL half", 40 * 1024**3, (9, 0), 66)
    assert card.matmul_flops == pytest.approx(989e12 / 2)
    assert card_of_device("NVIDIA GeForce RTX 4090", 24564 * 1024**2, (8, 9), 128) is RTX_4090
