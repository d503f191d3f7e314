"""`--fit`: an estimate as an answer, yes or an error that says what would help."""

from collections.abc import Sequence

from dsft.core.errors import DoesNotFitError
from dsft.core.memory.explain import explain_misfit
from dsft.core.memory.remedies import Remedy, find_remedies, least_budget_bytes, list_remedies
from dsft.core.units import format_gib
from dsft.estimate_memory.result import Breakdown, Comparison


def check_presets(result: Comparison) -> None:
    """Refuse presets that do not fit.

    Raises:
        DoesNotFitError: At least one does not.
    """
    misfits = [preset for preset in result.presets if not preset.planned.chosen.fits]
    if not misfits:
        return
    found = "; ".join(
        f"{preset.name} {explain_misfit(preset.planned.job, preset.planned.chosen)}" for preset in misfits
    )
    fixes = []
    for preset in misfits:
        job, fixed = preset.planned.job, preset.planned.fixed
        fixes.append(_list_ways(find_remedies(job, fixed), least_budget_bytes(job, fixed), preset.name))
    raise DoesNotFitError(f"{found}.", " ".join(fixes))


def check_configuration(result: Breakdown) -> None:
    """Refuse a configuration that does not fit.

    Raises:
        DoesNotFitError: It does not.
    """
    planned = result.planned
    if planned.chosen.fits:
        return
    raise DoesNotFitError(
        f"The run {explain_misfit(planned.job, planned.chosen)}.",
        _list_ways(result.remedies, result.least_budget_bytes),
    )


def _list_ways(remedies: Sequence[Remedy], card_bytes: int, preset: str | None = None) -> str:
    """Return the sentence that says what would help, of which preset where there are several."""
    enough, card = list_remedies(remedies), f"a card with {format_gib(card_bytes)} free"
    if not enough:
        start = "No" if preset is None else f"For {preset} no"
        return f"{start} change of the settings is enough; it takes {card}."
    start = "Enough" if preset is None else f"Enough for {preset}"
    return f"{start} would be {enough}, or {card}."
