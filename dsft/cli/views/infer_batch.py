"""How far a file of prompts has come, as a bar or as a line of words, and what it was at the end; owns no screen."""

from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import clip, count_nouns, draw_bar
from dsft.core.units import format_count, format_duration
from dsft.infer.batch_events import BatchProgress, BatchResult

_MIN_BAR_WIDTH, _MAX_BAR_WIDTH = 8, 40
_FIGURES_WIDTH = 60


@dataclass(frozen=True)
class BatchState:
    """Progress with its times, seconds on one monotonic clock.

    Attributes:
        progress: The newest.
        started_s: When the model was ready.
        reported_s: When the newest progress came.
    """

    progress: BatchProgress
    started_s: float
    reported_s: float

    @property
    def tok_per_s(self) -> float | None:
        """New tokens of whole answers by the time they took; None before there are any."""
        seconds = self.reported_s - self.started_s
        return self.progress.num_new_tokens / seconds if self.progress.num_answered and seconds > 0 else None

    def eta_s(self, now_s: float) -> float | None:
        """Return the seconds left if rows go on as they went; None before there are any."""
        progress = self.progress
        if not progress.num_answered:
            return None
        num_left = progress.num_rows - progress.num_done
        left_s = (self.reported_s - self.started_s) / progress.num_answered * num_left
        return max(0.0, left_s - (now_s - self.reported_s))


def advance(state: BatchState | None, progress: BatchProgress, now_s: float) -> BatchState:
    """Return the state after a report."""
    return BatchState(progress, now_s if state is None else state.started_s, now_s)


def format_line(state: BatchState, now_s: float) -> str:
    """Return how far it has come as one line of ASCII words, stable for grep."""
    progress = state.progress
    parts = [f"{format_count(progress.num_done)} of {count_nouns(progress.num_rows, 'row')}"]
    if progress.num_failed:
        parts.append(f"{format_count(progress.num_failed)} failed")
    if state.tok_per_s is not None:
        parts.append(f"{format_count(state.tok_per_s)} tok/s")
    eta_s = state.eta_s(now_s)
    if eta_s is not None and progress.num_done < progress.num_rows:
        parts.append(f"eta {format_duration(eta_s)}")
    return ", ".join(parts)


def render_state(state: BatchState | None, width: int, now_s: float) -> RenderableType:
    """Draw how far it has come on one line."""
    if state is None:
        return Text()
    progress = state.progress
    bar_width = min(_MAX_BAR_WIDTH, max(_MIN_BAR_WIDTH, width - _FIGURES_WIDTH))
    bar = draw_bar(progress.num_done / progress.num_rows, bar_width, "green")
    return AsciiFallback(clip(Text.assemble(bar, "  ", format_line(state, now_s)), width))


def describe_batch(result: BatchResult) -> str:
    """Return a result in one line."""
    parts = [count_nouns(result.num_rows, "row")]
    if result.num_resumed:
        parts.append(f"{format_count(result.num_resumed)} of them answered before")
    if result.num_failed:
        parts.append(f"{format_count(result.num_failed)} failed")
    tokens = f"{count_nouns(result.num_new_tokens, 'token')} in {format_duration(result.duration_s)}"
    parts.append(tokens if result.tok_per_s is None else f"{tokens}, {format_count(result.tok_per_s)} tok/s")
    if result.seed is not None:
        parts.append(f"seed {result.seed}")
    if result.output is not None:
        parts.append(f"answers in {result.output}")
    return "; ".join(parts)
