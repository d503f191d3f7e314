"""Why a GPU's clocks are lower than they could be: NVML's bits as names for scripts and words for people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ThrottleReason:
    """One reason.

    Attributes:
        name: In JSON and CSV; never changes.
        words: For people.
        is_brake: Whether work is slowed down by it; otherwise it is a matter of course (idle, or as it was set).
        is_alarming: Whether something is wrong with cooling, power supply or the card.
    """

    name: str
    words: str
    is_brake: bool = True
    is_alarming: bool = False


_REASONS = {
    0x001: ThrottleReason("gpu_idle", "idle", is_brake=False),
    0x002: ThrottleReason("applications_clocks_setting", "clocks set by user", is_brake=False),
    0x004: ThrottleReason("sw_power_cap", "power limit reached"),
    0x008: ThrottleReason("hw_slowdown", "hardware slowdown", is_alarming=True),
    0x010: ThrottleReason("sync_boost", "kept in step with another GPU"),
    0x020: ThrottleReason("sw_thermal_slowdown", "too hot: driver slows it down", is_alarming=True),
    0x040: ThrottleReason("hw_thermal_slowdown", "too hot: hardware slows it down", is_alarming=True),
    0x080: ThrottleReason("hw_power_brake_slowdown", "power supply calls for a brake", is_alarming=True),
    0x100: ThrottleReason("display_clock_setting", "clocks set by display", is_brake=False),
}
"""By NVML's bit (nvmlClocksEventReasons)."""

_BY_NAME = {reason.name: reason for reason in _REASONS.values()}
_UNKNOWN = "unknown_"
_HW_SLOWDOWN_CAUSES = frozenset({"hw_thermal_slowdown", "hw_power_brake_slowdown"})


def name_reasons(bits: int) -> tuple[str, ...]:
    """Return the names of the reasons in a mask, those of unknown bits too (`unknown_0x200`), lowest bit first."""
    names = []
    for position in range(bits.bit_length()):
        bit = 1 << position
        if bits & bit:
            names.append(_REASONS[bit].name if bit in _REASONS else f"{_UNKNOWN}{bit:#x}")
    return tuple(names)


def find_reason(name: str) -> ThrottleReason:
    """Return what is known of a reason by its name; one that is not known counts as a brake.

    Args:
        name: As `name_reasons` gives it.
    """
    return _BY_NAME.get(name) or ThrottleReason(name, f"reason {name.removeprefix(_UNKNOWN)}")


def explain_reasons(names: tuple[str, ...]) -> tuple[ThrottleReason, ...]:
    """Return the reasons that are worth telling, the gravest first.

    The bit for any slowdown by hardware is left out where its cause is told beside it.
    """
    reasons = [
        find_reason(name) for name in names if name != "hw_slowdown" or not _HW_SLOWDOWN_CAUSES.intersection(names)
    ]
    return tuple(sorted(reasons, key=lambda reason: (not reason.is_alarming, not reason.is_brake)))
