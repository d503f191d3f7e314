"""What a finished merge shows: the model, its verification, what it took, and the commands that use it."""

from pathlib import PurePath

from rich.console import Group, RenderableType
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import count_nouns
from dsft.cli.views.merge_progress import format_rate, format_size
from dsft.cli.views.sections import Row, ShellCommand, draw_section, draw_title
from dsft.core.data.example_question import example_question
from dsft.core.units import format_count, format_duration, format_gib
from dsft.merge.model_card import describe_verification, suggest_ollama_name
from dsft.merge.result import UPDATE_KEPT_ENOUGH, MergeResult


def render_merge(result: MergeResult) -> RenderableType:
    """Draw the end of a merge."""
    return AsciiFallback(
        Group(
            Text.assemble(("✓ ", "bold green"), (result.output, "bold"), " is written"),
            draw_section("Model", _model_rows(result)),
            draw_section("Verification", _verification_rows(result)),
            draw_section("Cost", _cost_rows(result)),
            draw_title("Next"),
            *_next_commands(result),
        )
    )


def _model_rows(result: MergeResult) -> list[Row]:
    base = Text(result.base)
    if result.base_revision:
        base.append(f" at {result.base_revision}", "dim")
    if result.base_rounding == "nf4":
        base.append(", rounded to NF4 and back")
    rows: list[Row] = [
        ("base", base),
        ("adapter", Text(f"{result.adapter}, changes {count_nouns(result.num_updated_tensors, 'tensor')}")),
        ("weights", Text(f"{format_count(result.num_parameters)} in {result.dtype}")),
        ("size", Text(f"{format_size(result.weight_bytes)} in {count_nouns(len(result.shards), 'file')}")),
    ]
    if result.update_kept is not None:
        style = "" if result.update_kept >= UPDATE_KEPT_ENOUGH else "yellow"
        kept = Text.assemble((f"{result.update_kept * 100:.1f} %", style), " left after rounding")
        rows.append(("update", kept))
    if result.gguf is not None:
        rows.append(("GGUF", Text(f"{result.gguf}, {result.gguf_type}, with a Modelfile")))
    return rows


def _verification_rows(result: MergeResult) -> list[Row]:
    if result.verification is None:
        return [("none", Text("left out by --no-verify"))]
    figures = describe_verification(result.verification, result.dtype)
    return [(name[0].lower() + name[1:] if name[1].islower() else name, Text(figure)) for name, figure in figures]


def _cost_rows(result: MergeResult) -> list[Row]:
    merged = format_duration(result.merge_s)
    if result.merge_s > 0:
        merged += f", {format_rate(result.weight_bytes / result.merge_s)} written"
    rows: list[Row] = [("merge", Text(f"{merged}, on {'a GPU' if result.device == 'cuda' else 'the CPU'}"))]
    if result.gguf_s is not None:
        rows.append(("GGUF", Text(format_duration(result.gguf_s))))
    if result.verify_s is not None:
        rows.append(("verification", Text(format_duration(result.verify_s))))
    rows.append(("peak memory", Text(f"{format_gib(result.peak_host_memory_bytes)} of host memory")))
    return rows


def _next_commands(result: MergeResult) -> list[ShellCommand]:
    ask = ["dsft", "infer", example_question(result.template)]
    commands = [ShellCommand(ask, ["--model", result.output])]
    if result.gguf is not None:
        modelfile = str(PurePath(result.output, "Modelfile"))
        commands.append(ShellCommand(["ollama", "create", suggest_ollama_name(result)], ["-f", modelfile]))
    return commands
