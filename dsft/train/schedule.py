"""The learning rate of each optimizer step, as a factor of its peak."""

import math
from typing import Literal


def learning_rate_factor(
    step: int, *, num_warmup_steps: int, num_steps: int, shape: Literal["cosine", "linear", "constant"]
) -> float:
    """Return the learning rate of a step as a share of its peak.

    It rises in equal parts over the warm-up, is at its peak in the step after that, and falls towards 0, which the
    step after the last one would have: no step of a run is taken with a rate of 0.

    Args:
        step: Optimizer steps done before this one.
        num_warmup_steps: Steps below the peak at the start.
        num_steps: Steps of the whole run.
        shape: Of the fall: half a cosine wave (arXiv:1608.03983), a straight line, or none.
    """
    if step < num_warmup_steps:
        return (step + 1) / (num_warmup_steps + 1)
    if shape == "constant":
        return 1.0
    progress = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    return 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
