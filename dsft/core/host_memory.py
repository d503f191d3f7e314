"""What a process has taken of the host's memory."""

import ctypes
import resource
from collections.abc import Callable
from functools import cache
from pathlib import Path


def peak_host_bytes() -> int:
    """Return the peak resident set of this process in bytes, pages of mapped files included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Unlike getrusage's, this figure begins anew with a program that a larger process has started.
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def return_freed_memory() -> None:
    """Give memory that was freed back to the system; glibc keeps what threads have freed, for each its own."""
    trim = _find_trim()
    if trim is not None:
        trim(0)


@cache
def _find_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
    return trim
