"""The help pages: names and values in one column, never cut, what they do in the other; knows no command by name."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from dsft.cli.plain_values import read_plainly

_Row = tuple[str, Text]
_MAX_CHOICES_CHARS = 24
_ANY_CHOICE = "NAME"


class HelpfulCommand(TyperCommand):
    """A command whose help is drawn here, and which reads simple values by itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's parameters."""
        return read_plainly(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page to stdout."""
        _write_help(self, ctx)


class HelpfulGroup(TyperGroup):
    """A group of commands whose help is drawn here, and which reads simple values by itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the group's parameters."""
        return read_plainly(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page to stdout."""
        _write_help(self, ctx)


def _write_help(command: Any, ctx: Any) -> None:
    from dsft.cli.output import Output

    console = Output().stdout
    console.print(Text(command.get_usage(ctx), style="bold"), soft_wrap=True)
    console.print(Padding(Text(command.help or ""), (1, 2)))
    sections: defaultdict[str, list[_Row]] = defaultdict(list)
    if isinstance(command, TyperGroup):
        sections["Commands"] = [(name, Text(entry.help or "")) for name, entry in command.commands.items()]
    own: list[_Row] = []
    for parameter in command.get_params(ctx):
        if not getattr(parameter, "hidden", False):
            panel = getattr(parameter, "rich_help_panel", None) or ""
            rows = (
                sections["Arguments"] if parameter.param_type_name == "argument" else sections[panel] if panel else own
            )
            rows.append((_name(parameter), _describe(parameter)))
    sections["Options"] = own
    for title, rows in sections.items():
        console.print(_section(title, rows))
    if command.epilog:
        console.print(Text(command.epilog, style="dim"))


def _section(title: str, rows: list[_Row]) -> Padding:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, description in rows:
        table.add_row(Text(name), description)
    return Padding(table, (0, 0, 1, 1))


def format_choices(choices: Sequence[str]) -> str:
    """Return what stands for a value that is one of a few; many of them are left to the help text."""
    listed = "|".join(choices)
    return listed if len(listed) < _MAX_CHOICES_CHARS else _ANY_CHOICE


def _name(parameter: Any) -> str:
    choices = _choices(parameter)
    value = parameter.metavar or (format_choices(choices) if choices else parameter.name.upper())
    if parameter.param_type_name == "argument":
        return str(value) if parameter.required else f"[{value}]"
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.secondary_opts:
        return f"--[no-]{names.removeprefix('--')}"
    return names if parameter.is_flag else f"{names} {value}"


def _describe(parameter: Any) -> Text:
    choices = _choices(parameter)
    listed = f" One of {', '.join(choices)}." if choices and format_choices(choices) == _ANY_CHOICE else ""
    default = parameter.default if getattr(parameter, "show_default", False) else None
    if parameter.param_type_name == "option" and parameter.is_flag:
        default = ("on" if default else "off") if parameter.secondary_opts else None
    return Text.assemble(parameter.help or "", listed, ("" if default is None else f" [default: {default}]", "dim"))


def _choices(parameter: Any) -> tuple[str, ...]:
    # typer before 0.29 keeps them elsewhere; then the option's name stands for its value.
    return getattr(getattr(parameter, "type_descriptor", None), "choices", None) or ()
