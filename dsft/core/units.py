"""Sizes and durations for people; bytes and seconds everywhere else."""

GIB = 1024**3


def format_gib(num_bytes: float) -> str:
    """Return bytes as GiB with one decimal, e.g. `18.3 GiB`."""
    return f"{num_bytes / GIB:.1f} GiB"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units, e.g. `1 h 05 min`, `2 min 07 s`, `3.4 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest_s = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(count: float) -> str:
    """Return a count with thin grouping for reading, e.g. `3,321,004`."""
    return f"{count:,.0f}"
