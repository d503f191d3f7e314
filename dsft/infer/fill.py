"""A gap in a text filled by the model: from what was asked to the prompt, and back into the file."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FillRequest:
    """Which gap is to be filled.

    Attributes:
        prefix: The text before the gap; None where a file has the mark.
        suffix: The text behind it; None where there is none, or a file has the mark.
        file: A file with the mark in it, instead of the two texts.
        in_place: Write what fills the gap into the file, in the mark's place.
    """

    prefix: str | None = None
    suffix: str | None = None
    file: Path | None = None
    in_place: bool = False
