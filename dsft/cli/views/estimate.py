"""The presets side by side as `dsft estimate-memory` shows them, and the head that all its views share."""

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.core.memory.cards import MIB
from dsft.core.memory.explain import micro_batch_size
from dsft.core.memory.plan import MARGIN_SHARE
from dsft.core.units import GIB, format_count, format_gib
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.plans import Planned
from dsft.estimate_memory.result import Comparison, PresetEstimate

_GIVES_WAY = "*"

GIVES_WAY_NOTE = (
    "More than a plan may take, and yet it fits: paged optimizer state takes what room there is, and goes to host "
    "memory where the run needs it."
)

_ROWS: tuple[tuple[str, Callable[[PresetEstimate], str]], ...] = (
    ("longest sample", lambda preset: format_count(preset.config.max_length)),
    ("LoRA rank", lambda preset: str(preset.config.lora_r)),
    ("effective batch", lambda preset: str(preset.config.effective_batch_size)),
    ("micro-batch × steps", lambda preset: describe_split(preset.planned)),
    ("blocks recomputed", lambda preset: describe_recomputed(preset.planned)),
    ("optimizer state", lambda preset: describe_optimizer(preset.planned)),
    ("GiB of the process", lambda preset: f"{preset.planned.chosen.memory.process_bytes / GIB:.1f}"),
    ("GiB on the device", lambda preset: f"{preset.planned.chosen.memory.device_bytes / GIB:.1f}"),
    ("fits", lambda preset: describe_fit(preset.planned)),
    ("tok/s", lambda preset: format_count(preset.planned.tok_per_s)),
    ("speed-up", lambda preset: f"{preset.planned.speed_up:.1f}×"),
    (
        "seed document, GB",
        lambda preset: f"~{preset.seed_memory_gb:g}" if preset.seed_memory_gb is not None else "none",
    ),
)


def render_comparison(result: Comparison) -> RenderableType:
    """Draw all presets in one table, each in a column, and each plan in words."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("preset", style="dim", no_wrap=True)
    for preset in result.presets:
        table.add_column(preset.name, justify="right")
    for name, draw in _ROWS:
        cells = [draw(preset) for preset in result.presets]
        table.add_row(name, *(Text(cell, "bold red" if cell == "no" else "") for cell in cells))
    parts: list[RenderableType] = [*render_head("Memory of training", result.budget), Text(), table, Text()]
    parts += [hang(f"{preset.name}: ", preset.explanation) for preset in result.presets]
    if any(preset.planned.gives_way for preset in result.presets):
        parts.append(hang(f"{_GIVES_WAY} ", GIVES_WAY_NOTE))
    parts += [Text(notice, "yellow") for notice in result.notices]
    more = "Speed-ups are over the settings as written. dsft estimate-memory --preset NAME shows every term."
    parts.append(Text(more, "dim"))
    return AsciiFallback(Group(*parts))


def render_head(title: str, budget: Budget) -> list[RenderableType]:
    """Draw what is planned for, and what kind of figures follow."""
    card = budget.card
    allowed = format_gib(card.usable_bytes * (1 - MARGIN_SHARE))
    head = [
        Text(title, "bold"),
        Text(f"{_describe_card(budget)}; a plan may take {allowed}, {MARGIN_SHARE * 100:g} % stay free"),
    ]
    kind = "Memory is predicted by the arithmetic of docs/memory.md"
    speed = "speed is, too" if card.is_measured else "so is speed, from an H100's and the card's data sheet"
    return [*head, Text(f"{kind}; {speed}. dsft bench measures both.", "dim")]


def _describe_card(budget: Budget) -> str:
    card = budget.card
    usable, total = format_gib(card.usable_bytes), f"{format_count(card.total_bytes / MIB)} MiB"
    return {
        "vram": f"planned for {card.name}, {usable} of it usable, otherwise like an RTX 4090",
        "gpu": f"planned for the {card.name}, {usable} usable of {total}",
        "device": f"planned for GPU 0, {card.name}: {usable} free of {total}",
        "default": f"no GPU here: planned for an {card.name}, {usable} usable of {total}",
    }[budget.origin]


def describe_split(planned: Planned) -> str:
    """Return micro-batch and passes, e.g. `4 × 4`."""
    size = micro_batch_size(planned.job, planned.chosen.plan)
    return f"{size} × {-(-planned.job.workload.effective_batch_size // size)}"


def describe_recomputed(planned: Planned) -> str:
    """Return how many blocks recompute, e.g. `9 of 32`."""
    return f"{planned.chosen.plan.num_recomputed} of {planned.job.shape.num_blocks}"


def describe_fit(planned: Planned) -> str:
    """Return whether a plan fits, with a mark where it does although it shows more than it may take."""
    if not planned.chosen.fits:
        return "no"
    return f"yes{_GIVES_WAY}" if planned.gives_way else "yes"


def describe_optimizer(planned: Planned) -> str:
    """Return where the optimizer state is."""
    return "paged" if planned.chosen.plan.pages_optimizer else "on device"


def hang(label: str, text: str) -> RenderableType:
    """Set a text so that its further lines stand under the first word after its label."""
    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row(label, Text(text))
    return Padding(grid, 0)
