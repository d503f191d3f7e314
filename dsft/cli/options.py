"""Options that several commands share, and the options made of the configuration's settings."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsft.cli.help import format_choices

if TYPE_CHECKING:
    from dsft.core.config.describe import Setting

RUN_PANEL = "Run"

JsonOption = Annotated[
    bool, typer.Option("--json", help="Write JSON lines to stdout, for programs.", rich_help_panel=RUN_PANEL)
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="Write only data, warnings and errors.", rich_help_panel=RUN_PANEL)
]


def _complete_preset(incomplete: str) -> list[str]:
    from dsft.core.config.presets import preset_paths

    return [name for name in preset_paths() if name.startswith(incomplete)]


PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        autocompletion=_complete_preset,
        help="Start from a preset: conservative, balanced, quality or tiny.",
        rich_help_panel=RUN_PANEL,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of settings; it overrides the preset, flags override it.",
        rich_help_panel=RUN_PANEL,
    ),
]


def takes_settings(command: Callable[..., None], *, also: Mapping[str, str] | None = None) -> Callable[..., None]:
    """Give a command one option for each setting of the training configuration.

    The settings the user has written on the command line reach the command as its first argument, a dict by
    field name. Their values are the texts as written (a bool for --x/--no-x): the schema judges them, so that all
    that is wrong is told at once.

    Args:
        command: The command.
        also: By field name, what this command's help says beyond the setting's own.
    """
    from dsft.core.config.describe import describe_settings

    settings = describe_settings()
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    @wraps(command)
    def wrapper(ctx: typer.Context, **values: Any) -> None:
        sources = {name: ctx.get_parameter_source(name) for name in settings}
        given = {name: values[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
        command(given, **{parameter.name: values[parameter.name] for parameter in own})

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    more = also or {}
    parameters = [context, *own, *(_make_parameter(each, more.get(name, "")) for name, each in settings.items())]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads this
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _make_parameter(setting: "Setting", more_help: str) -> inspect.Parameter:
    from dsft.core.config.describe import format_value

    kind, default = (bool, setting.default) if setting.kind == "bool" else (str, format_value(setting.default) or None)
    option = typer.Option(
        f"{setting.flag}/--no-{setting.flag.removeprefix('--')}" if setting.kind == "bool" else setting.flag,
        help=f"{setting.help} {more_help}".strip(),
        metavar=None if setting.kind == "bool" else _metavar(setting),
        autocompletion=_completer(setting.choices) if setting.choices else None,
        show_default=default is not None,
        rich_help_panel=setting.section,
    )
    annotation: Any = Annotated[kind if default is not None else kind | None, option]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _metavar(setting: "Setting") -> str:
    words = {"int": "N", "float": "X", "text": "TEXT"}
    return format_choices(setting.choices) if setting.kind == "choice" else words[setting.kind]


def _completer(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete
