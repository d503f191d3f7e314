"""What a run would do, as tables: each setting with its origin, the techniques, the steps."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.core.config.describe import describe_settings, format_value
from dsft.core.config.load import ResolvedConfig
from dsft.core.units import format_count

if TYPE_CHECKING:
    from dsft.train.run import DryRun


_TITLE = "Configuration"

_MIN_TABLE_WIDTH = 72
"""Below this many columns values and origins would be pieces of words beside the longest name."""


def render_config(resolved: ResolvedConfig) -> RenderableType:
    """Draw every setting with its value and origin, by section; what is not a default stands out."""
    return AsciiFallback(_Settings(resolved))


class _Settings:
    """Every setting in three columns or, where they have no room, in a line of its own."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        self._resolved = resolved

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _MIN_TABLE_WIDTH:
            yield Text(_TITLE, "bold")
            for cells in self._rows():
                yield Text("  ").join(cells)
            return
        table = _make_table(_TITLE)
        table.columns[0].no_wrap = True
        table.add_column(overflow="fold")
        for cells in self._rows():
            table.add_row(*cells)
        yield table

    def _rows(self) -> Iterator[list[Text]]:
        for section, settings in groupby(describe_settings().values(), key=lambda setting: setting.section):
            yield [Text(section, "bold")]
            for setting in settings:
                origin = self._resolved.origins[setting.name]
                style = "dim" if origin == "default" else ""
                value = format_value(getattr(self._resolved.config, setting.name)) or "none"
                yield [Text(f"  {setting.name}", style), Text(value, style), Text(origin, style or "cyan")]


def render_plan(dry: "DryRun") -> RenderableType:
    """Draw how many steps and samples the run would have, and how each technique would be used."""
    table = _make_table("\nWhat would run")
    counts = (
        ("optimizer steps", dry.num_steps),
        ("samples to train on", dry.num_train_samples),
        ("samples held out", dry.num_validation_samples),
    )
    for name, count in counts:
        table.add_row(Text(f"  {name}"), Text(format_count(count)))
    for technique, use in dry.techniques.items():
        table.add_row(Text(f"  {technique}"), Text(use))
    return AsciiFallback(table)


def _make_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table
