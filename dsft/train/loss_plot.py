"""Draws the losses of a run as a PNG; the only place that loads matplotlib, and only when it draws."""

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsft.train.events import TrainResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN_COLOR = "#2a6fbb"
_VALIDATION_COLOR = "#d1581b"
_TEXT_COLOR = "#2b2b2b"
_MIN_STEPS_SMOOTHED = 20
"""With fewer steps every one of them is a point and there is nothing to smooth."""


def draw_losses(result: TrainResult) -> bytes:
    """Draw training and validation loss over the optimizer steps.

    Returns:
        A PNG of 1280 x 720 pixels.
    """
    # The object interface: pyplot keeps global state and looks for a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    _plot_training(axes, result.losses)
    _plot_validation(axes, result)
    _decorate(axes, result)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script the font lacks is drawn as boxes; that is no reason to bother the user.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and its neighbours; NaN stays out of it.

    The window narrows at the beginning, where the loss falls fast, and is one-sided at the end.

    Args:
        values: One value a step.
        window: Odd number of steps.
    """
    reach = window // 2
    means: list[float] = []
    for index in range(len(values)):
        side = min(reach, index)
        near = [value for value in values[index - side : index + side + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _plot_training(axes: "Axes", losses: Sequence[tuple[int, float]]) -> None:
    steps = [step for step, _ in losses]
    values = [loss if math.isfinite(loss) else math.nan for _, loss in losses]
    if len(values) < _MIN_STEPS_SMOOTHED:
        axes.plot(steps, values, color=_TRAIN_COLOR, linewidth=1.6, marker="o", markersize=3.5, label="training")
        return
    window = max(5, len(values) // 20) | 1
    axes.plot(steps, values, color=_TRAIN_COLOR, linewidth=0.7, alpha=0.35, label="training, each step")
    axes.plot(steps, smooth(values, window), color=_TRAIN_COLOR, linewidth=2, label=f"training, mean of {window} steps")


def _plot_validation(axes: "Axes", result: TrainResult) -> None:
    points = [(step, loss) for step, loss in result.validation_losses if math.isfinite(loss)]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=_VALIDATION_COLOR, linewidth=1.4, marker="o", markersize=5, label="validation")
    if result.best_validation_loss is not None and result.best_step is not None:
        axes.plot([result.best_step], [result.best_validation_loss], color=_VALIDATION_COLOR, linestyle="none",
                  marker="*", markersize=14, markeredgecolor="white", zorder=5,
                  label=f"best: {result.best_validation_loss:.4f} at step {result.best_step}")  # fmt: skip


def _decorate(axes: "Axes", result: TrainResult) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(f"{result.run_name}: loss", loc="left", fontsize=12, fontweight="bold", color=_TEXT_COLOR,
                   parse_math=False, pad=22)  # fmt: skip
    subtitle = axes.text(0, 1.03, f"{result.model['name']} on {result.config['dataset']}", transform=axes.transAxes,
                         fontsize=9, color="#6b6b6b", parse_math=False)  # fmt: skip
    # A long path runs out of the picture rather than squeezing the axes.
    subtitle.set_in_layout(False)
    axes.set_xlabel("optimizer step", color=_TEXT_COLOR)
    axes.set_ylabel("cross-entropy of target tokens (nats)", color=_TEXT_COLOR)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#6b6b6b", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=_TEXT_COLOR)
