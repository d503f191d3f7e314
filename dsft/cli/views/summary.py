"""What a finished run shows: its techniques, its results, where its files are, and what to do next."""

import shlex

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import format_step_time, with_noun
from dsft.core.data.example_question import example_question
from dsft.core.units import format_count, format_duration, format_gib
from dsft.train.advice import suggest_speedup
from dsft.train.events import TrainResult
from dsft.train.summary import CARD, PLOT, SUMMARY

_Row = tuple[str, RenderableType]


def render_summary(result: TrainResult) -> RenderableType:
    """Draw the end of a run."""
    parts: list[RenderableType] = [
        Text.assemble(("✓ ", "bold green"), (result.run_name, "bold"), " is trained"),
        _section("Techniques", [(name, Text(use)) for name, use in result.techniques.items()]),
        _section("Results", _result_rows(result)),
        _section("Files", _file_rows(result)),
        _title("Next"),
        _InferCommand(result),
    ]
    advice = suggest_speedup(result)
    if advice is not None:
        parts += [_title("Faster"), Padding(Text(advice), (0, 0, 0, 2))]
    return AsciiFallback(Group(*parts))


def _title(text: str) -> Text:
    return Text(f"\n{text}", "bold cyan")


def _section(title: str, rows: list[_Row]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", min_width=16)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return Group(_title(title), Padding(table, (0, 0, 0, 2)))


def _result_rows(result: TrainResult) -> list[_Row]:
    epochs = f"{format_count(result.num_steps)}, {with_noun(f'{result.num_epochs:.3g}', 'epoch')}"
    start = f" for the steps after {result.first_step}" if result.first_step else ""
    rows: list[_Row] = [
        ("steps", Text(epochs)),
        ("time", Text(format_duration(result.duration_s) + start + (f" on {result.device}" if result.device else ""))),
        ("training loss", _fall(result.first_loss, result.final_loss)),
    ]
    if result.validation_losses and result.best_validation_loss is not None:
        _, first = result.validation_losses[0]
        last_step, last = result.validation_losses[-1]
        best = _fall(first, result.best_validation_loss).append(f" best, step {result.best_step}", "dim")
        if last_step != result.best_step:
            best.append(f"; {last:.4f} at step {last_step}", "dim")
        rows.append(("validation loss", best))
    kept = "of the last step" if result.kept == "last" else f"of the best step, {result.best_step}"
    rows.append(("adapter", Text(kept)))
    if result.train_tok_per_s > 0:
        speed = (
            f"{format_count(result.train_tok_per_s)} tok/s, {format_count(result.train_target_tok_per_s)} of them "
            f"targets; {format_step_time(result.step_s_median)} a step (median)"
        )
        rows.append(("speed", Text(speed)))
    rows.append(("peak memory", Text(_format_memory(result))))
    if result.predicted_memory_device_bytes is not None:
        rows.append(("predicted", Text(_format_prediction(result))))
    return rows


def _fall(first: float, last: float) -> Text:
    text = Text.assemble(f"{first:.4f} → ", (f"{last:.4f}", "bold"))
    if first <= 0:
        return text
    change = last / first - 1
    return text.append(f" ({change * 100:+.0f} %)", "green" if change < 0 else "yellow")


def _format_memory(result: TrainResult) -> str:
    if result.peak_memory_reserved_bytes is None:
        host = result.peak_host_memory_bytes
        return "unknown" if host is None else f"{format_gib(host)} of host memory"
    parts = []
    if result.peak_memory_allocated_bytes is not None:
        parts.append(f"{format_gib(result.peak_memory_allocated_bytes)} allocated")
    parts.append(f"{format_gib(result.peak_memory_reserved_bytes)} reserved")
    if result.peak_memory_device_bytes is not None:
        total = f" of {format_gib(result.memory_total_bytes)}" if result.memory_total_bytes else ""
        parts.append(f"{format_gib(result.peak_memory_device_bytes)}{total} on the device")
    return " · ".join(parts)


def _format_prediction(result: TrainResult) -> str:
    pairs = (
        ("allocated", result.predicted_memory_allocated_bytes, result.peak_memory_allocated_bytes),
        ("reserved", result.predicted_memory_reserved_bytes, result.peak_memory_reserved_bytes),
        ("on the device", result.predicted_memory_device_bytes, result.peak_memory_device_bytes),
    )
    parts = []
    for name, predicted, measured in pairs:
        if predicted is not None:
            error = f" ({(predicted / measured - 1) * 100:+.1f} %)" if measured else ""
            parts.append(f"{format_gib(predicted)} {name}{error}")
    return " · ".join(parts)


def _file_rows(result: TrainResult) -> list[_Row]:
    return [
        ("adapter", Text.assemble(result.save_dir, (f"  with tokenizer, {SUMMARY}, {PLOT}, {CARD}", "dim"))),
        ("checkpoints", Text(result.output_dir)),
    ]


class _InferCommand:
    """The command that asks the model, in one line or, where that does not fit, in two that can be pasted as well.

    A line that is still too long is left to the terminal to wrap: a line end inside it would be part of the question.
    """

    def __init__(self, result: TrainResult) -> None:
        self._ask = "  " + shlex.join(["dsft", "infer", example_question(result.template)])
        self._model = shlex.join(["--model", result.save_dir])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Not padded: a blank behind the backslash would end the command there.
        line = f"{self._ask} {self._model}"
        fits = cell_len(line) <= options.max_width
        yield Text(line if fits else f"{self._ask} \\\n    {self._model}", no_wrap=True, overflow="ignore")
