"""How full memory, swap and disk are."""

import pytest

from dsft.monitor.sample import GpuSample, HostSample, MigSample
from dsft.monitor.shares import disk_percent, ram_percent, swap_percent, vram_percent


def test_a_card_is_full_where_nothing_is_free() -> None:
    card = GpuSample(0, None, None, memory_used_bytes=15, memory_free_bytes=0, memory_total_bytes=16)
    assert vram_percent(card) == 100
    part = MigSample(0, None, None, memory_used_bytes=3, memory_reserved_bytes=1, memory_free_bytes=12)
    assert vram_percent(part) is None
    assert vram_percent(GpuSample(0, None, None, memory_used_bytes=4, memory_total_bytes=16)) == 25
    assert vram_percent(GpuSample(0, None, None)) is None


def test_memory_that_can_be_had_is_not_in_use() -> None:
    host = HostSample(memory_used_bytes=12, memory_available_bytes=8, memory_total_bytes=16)
    assert ram_percent(host) == 50
    assert ram_percent(HostSample(memory_used_bytes=12, memory_total_bytes=16)) == 75
    assert ram_percent(HostSample(memory_total_bytes=0, memory_available_bytes=0)) is None


def test_blocks_for_root_alone_are_no_room_on_the_disk() -> None:
    host = HostSample(disk_used_bytes=25, disk_free_bytes=15, disk_total_bytes=100)
    assert disk_percent(host) == pytest.approx(62.5)
    assert disk_percent(HostSample(disk_used_bytes=95, disk_free_bytes=0, disk_total_bytes=100)) == 100
    assert disk_percent(HostSample(disk_used_bytes=95, disk_total_bytes=100)) is None


def test_no_swap_has_no_share() -> None:
    assert swap_percent(HostSample(swap_used_bytes=0, swap_total_bytes=0)) is None
    assert swap_percent(HostSample(swap_used_bytes=1, swap_total_bytes=4)) == 25
