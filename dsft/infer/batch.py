"""Many prompts of a file answered in groups of like length, in an order that a later process can go on from."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BatchRequest:
    """Which prompts are to be answered, and where the answers go.

    Attributes:
        file: The prompts.
        output: The file of answers; None is stdout.
        batch_size: Most prompts at once; None is as many as the model takes.
    """

    file: Path
    output: Path | None = None
    batch_size: int | None = None
