"""What an answer took, in one line."""

from typing import TYPE_CHECKING

from dsft.cli.views.drawing import count_nouns
from dsft.core.units import format_count, format_duration, format_gib

if TYPE_CHECKING:
    from dsft.infer.result import InferResult

_STOP_WORDS = {
    "end_token": "ended by itself",
    "stop_string": "ended by a stop text",
    "code_complete": "ended where the code block does",
    "max_new_tokens": "cut at --max-new-tokens",
    "context_full": "cut because the model's context is full",
}


def describe_statistics(result: "InferResult", *, with_process: bool = True) -> str:
    """Return an answer's figures in one line.

    Args:
        result: The answer.
        with_process: Also what the process took as a whole: to load the model, and memory.
    """
    parts = [describe_end(result), f"first token after {result.time_to_first_token_s:.2f} s"]
    if result.tok_per_s is not None:
        parts.append(f"{result.tok_per_s:.1f} tok/s")
    if result.speculation is not None:
        drafted, accepted = result.speculation.num_drafted, result.speculation.num_accepted
        parts.append(f"{format_count(accepted)} of {count_nouns(drafted, 'drafted token')} taken")
    if with_process:
        parts.append(f"loaded in {format_duration(result.load_s)}")
        where = "peak GPU memory" if result.device == "cuda" else "peak memory"
        parts.append(f"{where} {format_gib(result.peak_memory_bytes)}")
    if result.seed is not None:
        parts.append(f"seed {result.seed}")
    return "; ".join(parts)


def describe_end(result: "InferResult") -> str:
    """Return how many tokens an answer has and why it ended."""
    return f"{count_nouns(result.num_new_tokens, 'token')}, {_STOP_WORDS[result.stop_reason]}"
