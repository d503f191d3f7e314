"""`dsft estimate-memory`: settings and a card in, a table of presets or one configuration taken apart out."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsft.cli.options import RUN_PANEL, ConfigOption, JsonOption, PresetOption, QuietOption, takes_settings
from dsft.cli.output import Mode, Output
from dsft.core.errors import ConfigError

if TYPE_CHECKING:
    from dsft.estimate_memory.result import Breakdown, Comparison

_LONGEST = "auto"


@partial(takes_settings, also={"max_length": f"Or {_LONGEST}: the longest that fits."})
def estimate_memory(
    flags: dict[str, Any],
    *,
    preset: PresetOption = None,
    config: ConfigOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help='Plan for this card, e.g. "RTX 4090"; without it for --vram, else for the GPU that is there, '
            "else for an RTX 4090.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    use_fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="End with code 3 if anything that was asked for does not fit, and say what would help.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False,
    use_json: JsonOption = False,
    is_quiet: QuietOption = False,
) -> None:
    """Predict the memory of training, inference and merging."""
    from dsft.core.config.load import load_train_config
    from dsft.estimate_memory.budget import choose_budget
    from dsft.estimate_memory.run import break_down, compare_presets

    output = Output(use_json=use_json, is_quiet=is_quiet)
    asks_longest = str(flags.get("max_length")).lower() == _LONGEST
    settings = {name: value for name, value in flags.items() if not (name == "max_length" and asks_longest)}
    resolved = load_train_config(preset, config, settings)
    if gpu is not None and resolved.config.vram is not None:
        origin = resolved.origins["vram"]
        setting = origin if origin == "--vram" else f"{origin}: vram"
        raise ConfigError(f"{setting} and --gpu both say which card to plan for.", "Give one of them.")
    budget = choose_budget(resolved.config.vram, gpu)
    if preset is None and config is None and flags.keys() <= {"vram"}:
        _show_comparison(compare_presets(budget), output, use_fit=use_fit)
    else:
        breakdown = break_down(resolved.config, budget, finds_longest=asks_longest)
        _show_breakdown(breakdown, output, use_fit=use_fit)


def _show_comparison(result: "Comparison", output: Output, *, use_fit: bool) -> None:
    from dsft.estimate_memory.fit import check_presets
    from dsft.estimate_memory.record import record_comparison

    if output.mode is not Mode.JSON:
        from dsft.cli.views.estimate import render_comparison

        output.answer(render_comparison(result))
    output.emit(record_comparison(result))
    if use_fit:
        check_presets(result)


def _show_breakdown(result: "Breakdown", output: Output, *, use_fit: bool) -> None:
    from dsft.estimate_memory.fit import check_configuration
    from dsft.estimate_memory.record import record_breakdown

    if output.mode is not Mode.JSON:
        from dsft.cli.views.breakdown import render_breakdown

        output.answer(render_breakdown(result, has_remedies=not use_fit))
    output.emit(record_breakdown(result))
    if use_fit:
        check_configuration(result)
