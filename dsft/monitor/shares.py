"""How full something is, in percent: one definition for the screen and for alerts; None is not told."""

from dsft.monitor.sample import GpuSample, HostSample, MigSample


def vram_percent(gpu: GpuSample | MigSample) -> float | None:
    """Return how much of a GPU's memory can't be had; what the driver reserves counts: full is nothing free."""
    return _percent_taken(gpu.memory_used_bytes, gpu.memory_free_bytes, gpu.memory_total_bytes)


def ram_percent(host: HostSample) -> float | None:
    """Return how much of the host's memory, or of the control group's limit, programs can't have without swapping."""
    return _percent_taken(host.memory_used_bytes, host.memory_available_bytes, host.memory_total_bytes)


def swap_percent(host: HostSample) -> float | None:
    """Return how much of the swap is used; None where there is none, too."""
    return to_percent(host.swap_used_bytes, host.swap_total_bytes)


def disk_percent(host: HostSample) -> float | None:
    """Return how much of the disk is used, of what users may fill, as `df` tells it: root's own blocks don't count."""
    used, free = host.disk_used_bytes, host.disk_free_bytes
    return None if used is None or free is None else to_percent(used, used + free)


def _percent_taken(used_bytes: int | None, free_bytes: int | None, total_bytes: int | None) -> float | None:
    if free_bytes is None or total_bytes is None:
        return to_percent(used_bytes, total_bytes)
    free = to_percent(free_bytes, total_bytes)
    return None if free is None else 100 - free


def to_percent(part: float | None, whole: float | None) -> float | None:
    """Return a part of a whole in percent, None where either is not told."""
    return None if part is None or not whole else 100 * part / whole
