"""What a finished run shows: its techniques, its results, where its files are, and what to do next."""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import format_step_time, with_noun
from dsft.cli.views.sections import Row, ShellCommand, draw_section, draw_title
from dsft.core.data.example_question import example_question
from dsft.core.units import format_count, format_duration, format_gib
from dsft.train.advice import suggest_speedup
from dsft.train.events import TrainResult
from dsft.train.summary import CARD, PLOT, SUMMARY


def render_summary(result: TrainResult) -> RenderableType:
    """Draw the end of a run."""
    parts: list[RenderableType] = [
        Text.assemble(("✓ ", "bold green"), (result.run_name, "bold"), " is trained"),
        draw_section("Techniques", [(name, Text(use)) for name, use in result.techniques.items()]),
        draw_section("Results", _result_rows(result)),
        draw_section("Files", _file_rows(result)),
        draw_title("Next"),
        ShellCommand(["dsft", "infer", example_question(result.template)], ["--model", result.save_dir]),
    ]
    advice = suggest_speedup(result)
    if advice is not None:
        parts += [draw_title("Faster"), Padding(Text(advice), (0, 0, 0, 2))]
    return AsciiFallback(Group(*parts))


def _result_rows(result: TrainResult) -> list[Row]:
    epochs = f"{format_count(result.num_steps)}, {with_noun(f'{result.num_epochs:.3g}', 'epoch')}"
    start = f" for the steps after {result.first_step}" if result.first_step else ""
    rows: list[Row] = [
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


def _file_rows(result: TrainResult) -> list[Row]:
    return [
        ("adapter", Text.assemble(result.save_dir, (f"  with tokenizer, {SUMMARY}, {PLOT}, {CARD}", "dim"))),
        ("checkpoints", Text(result.output_dir)),
    ]
