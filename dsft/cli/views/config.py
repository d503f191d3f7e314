"""The resolved training configuration as a table: each value and where it came from."""

from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsft.core.config.describe import describe_settings, format_value
from dsft.core.config.load import ResolvedConfig


def render_config(resolved: ResolvedConfig) -> RenderableType:
    """Draw every setting with its value and origin, by section; what is not a default stands out."""
    return Group(*(
        _render_section(resolved, title, [setting.name for setting in settings])
        for title, settings in groupby(describe_settings().values(), key=lambda setting: setting.section)
    ))  # fmt: skip


def _render_section(resolved: ResolvedConfig, title: str, names: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column("setting", min_width=28, no_wrap=True)
    table.add_column("value", min_width=24, overflow="fold")
    table.add_column("origin", overflow="fold")
    for name in names:
        origin = resolved.origins[name]
        style = "dim" if origin == "default" else ""
        value = format_value(getattr(resolved.config, name)) or "none"
        table.add_row(Text(f"  {name}", style), Text(value, style), Text(origin, style or "cyan"))
    return table
