"""What a merge tells while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Notice:
    """A sentence the user should read.

    Attributes:
        text: The sentence.
        level: A warning is told in quiet mode too.
    """

    text: str
    level: Literal["note", "warning"] = "note"


@dataclass(frozen=True)
class Progress:
    """How far a phase has come.

    Attributes:
        phase: "merge", "write gguf" or "verify"; they follow one another.
        done_bytes: Bytes of weights done; the first report of a phase has 0.
        total_bytes: Bytes of weights of the whole phase.
    """

    phase: Literal["merge", "write gguf", "verify"]
    done_bytes: int
    total_bytes: int


EventSink = Callable[[Notice | Progress], None]
