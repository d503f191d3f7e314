"""One configuration's memory term by term, with bars and totals, and what inference, a merge and the host need."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import draw_bar
from dsft.cli.views.estimate import (
    GIVES_WAY_NOTE,
    describe_fit,
    describe_optimizer,
    describe_recomputed,
    describe_split,
    render_head,
)
from dsft.core.memory.cards import MIB
from dsft.core.memory.plan import needed_bytes
from dsft.core.memory.remedies import Remedy
from dsft.core.memory.training import Term
from dsft.core.units import GIB, format_count, format_gib
from dsft.estimate_memory.result import Breakdown

_BAR_WIDTH = 14

_INDENT = "  "

_WIDE = 108
"""From this many columns on a term's formula stands beside it, below it otherwise."""


def render_breakdown(result: Breakdown, *, has_remedies: bool = True) -> RenderableType:
    """Draw an estimate from its largest question, whether it fits, to its smallest term.

    Args:
        result: The estimate.
        has_remedies: Draw what would make it fit, too.
    """
    config, memory = result.config, result.planned.chosen.memory
    parts: list[RenderableType] = [
        *render_head(f"Memory of training {config.model_name}", result.budget),
        Text(),
        _render_settings(result),
        _Terms(memory.terms, memory.device_bytes),
        _render_totals(result),
    ]
    if has_remedies and not result.planned.chosen.fits:
        parts.append(_render_remedies(result.remedies, result.least_budget_bytes))
    parts += [_render_inference(result), _render_host(result)]
    parts += [Text(notice, "yellow") for notice in result.notices]
    return AsciiFallback(Group(*parts))


def _render_settings(result: Breakdown) -> RenderableType:
    config, planned = result.config, result.planned
    run = planned.chosen
    return _pairs(
        [
            ("longest sample", _describe_length(result)),
            ("LoRA rank", str(config.lora_r)),
            ("effective batch", f"{config.effective_batch_size} = {describe_split(planned)}"),
            ("plan", f"{describe_recomputed(planned)} blocks recompute, optimizer state {describe_optimizer(planned)}"),
            ("in words", result.explanation),
            ("speed", f"{format_count(planned.tok_per_s)} tok/s, {run.time.step_s:.2f} s a step"),
        ]
    )


def _describe_length(result: Breakdown) -> str:
    length = f"{format_count(result.config.max_length)} tokens"
    if result.longest_possible is None:
        return length
    if result.config.max_length == result.longest_possible:
        return f"{length}, all the model takes"
    return f"{length}, the longest that fits; the model takes {format_count(result.longest_possible)}"


class _Terms:
    """Every term with its share, in groups; the formula beside or below it."""

    def __init__(self, terms: Sequence[Term], total_bytes: int) -> None:
        self._terms = terms
        self._total_bytes = total_bytes
        self._name_width = max(len(term.name) for term in terms) + len(_INDENT)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for group, members in groupby(self._terms, key=lambda term: term.group):
            terms = list(members)
            total = sum(term.num_bytes for term in terms)
            yield Text()
            yield Text(self._figures(str(group), total), "bold")
            for term in terms:
                yield self._draw(term, options.max_width)

    def _figures(self, name: str, num_bytes: int) -> str:
        share = num_bytes / self._total_bytes * 100
        percent = "<1" if 0 < share < 0.5 else f"{share:.0f}"
        return f"{name:<{self._name_width}}  {_small(num_bytes):>10}  {percent:>3} %"

    def _draw(self, term: Term, width: int) -> RenderableType:
        line = Text(self._figures(_INDENT + term.name, term.num_bytes))
        room = min(_BAR_WIDTH, width - len(line) - 2)
        if room > 0:
            line.append("  ").append_text(draw_bar(term.num_bytes / self._total_bytes, room, "cyan"))
        formula = Text(term.formula, "dim")
        if width < _WIDE:
            return Group(line, Padding(formula, (0, 0, 0, 2 * len(_INDENT))))
        beside = Table.grid(padding=(0, 2, 0, 0))
        beside.add_column(no_wrap=True)
        beside.add_column(overflow="fold")
        beside.add_row(line, formula)
        return beside


def _render_totals(result: Breakdown) -> RenderableType:
    memory, job = result.planned.chosen.memory, result.planned.job
    rows = [
        ("PyTorch allocates", format_gib(memory.allocated_bytes)),
        ("PyTorch reserves", format_gib(memory.reserved_bytes)),
        ("the process", format_gib(memory.process_bytes)),
        ("on the device", f"{format_gib(memory.device_bytes)} of {format_gib(result.budget.card.total_bytes)}"),
    ]
    if memory.paged_out_bytes:
        rows.append(("in host memory", f"{format_gib(memory.paged_out_bytes)} of the optimizer state, in each step"))
    allowed, free = format_gib(job.allowed_bytes), job.allowed_bytes - memory.process_bytes
    fit = describe_fit(result.planned)
    if not result.planned.chosen.fits:
        rows.append(("fits", f"{fit}, {allowed} may be taken"))
    elif result.planned.gives_way:
        rows.append(("fits", f"{fit}, {format_gib(needed_bytes(job, memory))} of {allowed} without its paged state"))
        rows.append(("", f"* {GIVES_WAY_NOTE}"))
    else:
        rows.append(("fits", f"{fit}, within {allowed}: {format_gib(free)} left"))
    return _section("In all, at the peak", _pairs(rows))


def _render_remedies(remedies: Sequence[Remedy], least_budget_bytes: int) -> RenderableType:
    rows = [
        (remedy.change, f"saves {format_gib(remedy.saved_bytes)}, {'fits' if remedy.fits else 'not enough'}")
        for remedy in remedies
    ]
    rows.append(("a larger card", f"with {format_gib(least_budget_bytes)} free"))
    return _section("What would make it fit, cheapest first", _pairs(rows))


def _render_inference(result: Breakdown) -> RenderableType:
    rows = [(name, f"{format_gib(memory.process_bytes)}") for name, memory in result.generation.items()]
    title = f"Inference, prompt and answer of {format_count(result.config.max_length)} tokens"
    return _section(title, _pairs(rows))


def _render_host(result: Breakdown) -> RenderableType:
    host = result.host
    *needed, mapped = host.memory
    rows = [
        ("to train", f"{_sum(needed)}, and {_small(mapped.num_bytes)} of file pages while the model loads"),
        (
            "to merge",
            f"{_small(host.streamed_merge_bytes)} by `dsft merge`, {_small(host.whole_merge_bytes)} as a whole model",
        ),
    ]
    disk = [(term.name, f"{_small(term.num_bytes)}, {term.formula}") for term in host.disk]
    disk.append(("in all", _small(sum(term.num_bytes for term in host.disk))))
    return Group(_section("Host memory", _pairs(rows)), _section("Disk", _pairs(disk)))


def _sum(terms: Sequence[Term]) -> str:
    return format_gib(sum(term.num_bytes for term in terms))


def _small(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 100 else f"{num_bytes / MIB:.2f} MiB"


def _section(title: str, content: RenderableType) -> RenderableType:
    return Group(Text(f"\n{title}", "bold cyan"), Padding(content, (0, 0, 0, 2)))


def _pairs(rows: Sequence[tuple[str, str]]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table
