"""`--fit`: an estimate as an answer, yes or an error that says what would help."""

from dsft.core.errors import DoesNotFitError
from dsft.core.memory.explain import explain_misfit
from dsft.core.memory.remedies import find_remedies, list_remedies
from dsft.core.units import format_gib
from dsft.estimate_memory.result import Breakdown, Comparison

_NOTHING = "no change of the settings"


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
        enough = list_remedies(find_remedies(preset.planned.job, preset.planned.fixed)) or _NOTHING
        fixes.append(f"For {preset.name} enough would be {enough}.")
    raise DoesNotFitError(f"{found}.", " ".join(fixes))


def check_configuration(result: Breakdown) -> None:
    """Refuse a configuration that does not fit.

    Raises:
        DoesNotFitError: It does not.
    """
    planned = result.planned
    if planned.chosen.fits:
        return
    needs = format_gib(result.least_budget_bytes)
    raise DoesNotFitError(
        f"The run {explain_misfit(planned.job, planned.chosen)}.",
        f"Enough would be {list_remedies(result.remedies) or _NOTHING}; or a card with {needs} free.",
    )
