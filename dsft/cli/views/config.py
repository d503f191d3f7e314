"""What a run would do, as tables: each setting with its origin, the techniques, the steps."""

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsft.core.config.describe import describe_settings, format_value
from dsft.core.config.load import ResolvedConfig
from dsft.core.units import format_count

if TYPE_CHECKING:
    from dsft.train.run import DryRun


def render_config(resolved: ResolvedConfig) -> RenderableType:
    """Draw every setting with its value and origin, by section; what is not a default stands out."""
    table = _make_table("Configuration")
    table.add_column(overflow="fold")
    for section, settings in groupby(describe_settings().values(), key=lambda setting: setting.section):
        table.add_row(Text(section, "bold"))
        for setting in settings:
            origin = resolved.origins[setting.name]
            style = "dim" if origin == "default" else ""
            value = format_value(getattr(resolved.config, setting.name)) or "none"
            table.add_row(Text(f"  {setting.name}", style), Text(value, style), Text(origin, style or "cyan"))
    return table


def render_plan(dry: "DryRun") -> RenderableType:
    """Draw how many steps and samples the run would have, and how each technique would be used."""
    table = _make_table("What would run")
    counts = (
        ("optimizer steps", dry.num_steps),
        ("samples to train on", dry.num_train_samples),
        ("samples held out", dry.num_validation_samples),
    )
    for name, count in counts:
        table.add_row(Text(f"  {name}"), Text(format_count(count)))
    for technique, use in dry.techniques.items():
        table.add_row(Text(f"  {technique}"), Text(use))
    return table


def _make_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=28, no_wrap=True)
    table.add_column(min_width=24, overflow="fold")
    return table
