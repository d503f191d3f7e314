"""Figures of a sample in words, and the colours they are drawn in; what is not told is N/A, never 0."""

from dsft.core.units import GIB

MISSING = "N/A"
"""Stands for what is not told."""

_RATE_UNITS = ((GIB, "GiB/s"), (1024**2, "MiB/s"), (1024, "KiB/s"))
_NEAR_SLOWDOWN_C = 10
_WARM_C = 80
"""Taken for a limit where the card tells none."""


def format_figure(value: float | None, unit: str) -> str:
    """Return a whole number with its unit, e.g. `97 %`."""
    return MISSING if value is None else f"{value:.0f} {unit}"


def format_share(part: float | None, whole: float | None, unit: str, of: str = " of ") -> str:
    """Return a part of a whole, e.g. `412 of 450 W`; the part alone where the whole is not told."""
    if part is None or whole is None:
        return format_figure(part, unit)
    return f"{part:.0f}{of}{whole:.0f} {unit}"


def format_memory(used_bytes: int | None, total_bytes: int | None, of: str = " of ", digits: int = 1) -> str:
    """Return used and total memory, e.g. `17.9 of 24.0 GiB`."""
    if used_bytes is None and total_bytes is None:
        return MISSING
    used = MISSING if used_bytes is None else f"{used_bytes / GIB:.{digits}f}"
    return f"{used} GiB" if total_bytes is None else f"{used}{of}{total_bytes / GIB:.{digits}f} GiB"


def format_size(num_bytes: int | None) -> str:
    """Return a size as GiB, small ones as MiB."""
    if num_bytes is None:
        return MISSING
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 1024**2:.0f} MiB"


def format_rate(bytes_per_s: float | None) -> str:
    """Return a rate in the unit that suits it, e.g. `1.3 GiB/s`."""
    if bytes_per_s is None:
        return MISSING
    for size, unit in _RATE_UNITS:
        if bytes_per_s >= size:
            digits = 1 if bytes_per_s < 10 * size else 0
            return f"{bytes_per_s / size:.{digits}f} {unit}"
    return f"{bytes_per_s:.0f} B/s"


def level_style(percent: float | None) -> str:
    """Return the colour of something that must not fill up."""
    if percent is None:
        return "dim"
    return "green" if percent < 80 else "yellow" if percent < 93 else "red"


def heat_style(temperature_c: float | None, slowdown_c: float | None) -> str:
    """Return the colour of a temperature."""
    if temperature_c is None:
        return "dim"
    limit_c = _WARM_C + _NEAR_SLOWDOWN_C if slowdown_c is None else slowdown_c
    return "red" if temperature_c >= limit_c else "yellow" if temperature_c >= limit_c - _NEAR_SLOWDOWN_C else "green"
