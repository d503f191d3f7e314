"""Plain arithmetic on what was measured: spreads, rates, padding, floating-point operations, errors; no torch."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsft.core.memory.model_shape import ModelShape


@dataclass(frozen=True)
class Spread:
    """How values lie: their median, their extremes and the bounds of their middle half."""

    median: float
    min: float
    max: float
    q1: float
    q3: float


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step as it ran.

    Attributes:
        step_s: From the end of the step before to its own end, all kernels finished.
        num_tokens: Tokens of its samples.
        num_targets: Tokens that carry loss.
        num_padded_tokens: Tokens its micro-batches would have, were each sample padded to the longest beside it.
        num_micro_batches: Forward and backward passes.
    """

    step_s: float
    num_tokens: int
    num_targets: int
    num_padded_tokens: int
    num_micro_batches: int


@dataclass(frozen=True)
class Speed:
    """How fast optimizer steps ran; every rate is the median over the steps of the rate of each.

    Attributes:
        tok_per_s: Tokens of samples in a second.
        padded_tok_per_s: Tokens in a second, counted with padding.
        target_tok_per_s: Tokens that carry loss in a second.
        step_s: Seconds of a step.
        steps: The steps, warm-up left out.
    """

    tok_per_s: float
    padded_tok_per_s: float
    target_tok_per_s: float
    step_s: Spread
    steps: tuple[StepFigures, ...]


@dataclass(frozen=True)
class MemoryFigures:
    """A peak of GPU memory: what PyTorch's allocator gave out, what it held, and what the whole device had in use."""

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int | None


def measure_spread(values: Iterable[float]) -> Spread:
    """Return the spread of at least one value; quartiles are interpolated between the values next to them."""
    ordered = sorted(values)
    q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return Spread(statistics.median(ordered), ordered[0], ordered[-1], q1, q3)


def measure_speed(steps: Sequence[StepFigures]) -> Speed:
    """Return the speed of at least one step."""
    return Speed(
        tok_per_s=statistics.median(step.num_tokens / step.step_s for step in steps),
        padded_tok_per_s=statistics.median(step.num_padded_tokens / step.step_s for step in steps),
        target_tok_per_s=statistics.median(step.num_targets / step.step_s for step in steps),
        step_s=measure_spread(step.step_s for step in steps),
        steps=tuple(steps),
    )


def count_padded(num_samples: int, longest: int) -> int:
    """Return the tokens of a micro-batch whose samples are all padded to its longest."""
    return num_samples * longest


def count_useful_flops(shape: ModelShape, num_tokens: float, num_targets: float) -> float:
    """Return the floating-point operations that training on tokens needs at least, LoRA's own left out.

    A frozen linear weight takes part in one product forward and one backward (it has no gradient of its own), 2
    operations each for a token; so does each weight of the head for a target. What is recomputed is no use.
    """
    return 4 * shape.num_linear_weights * num_tokens + 4 * shape.vocab_size * shape.hidden_size * num_targets


def count_useful_flops_per_s(shape: ModelShape, steps: Sequence[StepFigures]) -> float:
    """Return the median over the steps of the useful operations in a second."""
    return statistics.median(
        count_useful_flops(shape, step.num_tokens, step.num_targets) / step.step_s for step in steps
    )


def error_percent(predicted_bytes: int, measured_bytes: int) -> float:
    """Return by how much a prediction is off, in percent of what was measured; negative where it is too low."""
    return (predicted_bytes / measured_bytes - 1) * 100


def compare_memory(predicted: MemoryFigures, measured: MemoryFigures) -> dict[str, float]:
    """Return the error of each predicted figure in percent, for those that were measured."""
    errors = {
        "allocated": error_percent(predicted.allocated_bytes, measured.allocated_bytes),
        "reserved": error_percent(predicted.reserved_bytes, measured.reserved_bytes),
    }
    if predicted.device_bytes is not None and measured.device_bytes is not None:
        errors["device"] = error_percent(predicted.device_bytes, measured.device_bytes)
    return errors
