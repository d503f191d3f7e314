"""What is told of a batch while it runs and at its end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BatchProgress:
    """How far a batch has come.

    Attributes:
        num_rows: Rows of the file.
        num_resumed: Those whose answers an earlier process left.
        num_answered: Those that this process has answered.
        num_failed: Those that have no answer and get none.
        num_new_tokens: Tokens that this process has generated in whole answers.
    """

    num_rows: int
    num_resumed: int = 0
    num_answered: int = 0
    num_failed: int = 0
    num_new_tokens: int = 0

    @property
    def num_done(self) -> int:
        """Rows that nothing is left to do for."""
        return self.num_resumed + self.num_answered + self.num_failed


@dataclass(frozen=True)
class BatchListener:
    """Who is told what happens.

    Attributes:
        on_notice: Receives sentences the user should read.
        on_bad_row: Receives the place of a row that has no answer, and why.
        on_progress: Receives how far it has come, first when the model is ready.
        on_record: Receives the rows' records in order, where there is no output file.
    """

    on_notice: Callable[[str], None]
    on_bad_row: Callable[[str], None]
    on_progress: Callable[[BatchProgress], None]
    on_record: Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class BatchResult:
    """What a batch was and what it took; the object that `--json` ends with.

    Attributes:
        num_rows: Rows of the file.
        num_answered: Rows with an answer, those of earlier processes included.
        num_resumed: Rows whose answers an earlier process left.
        num_failed: Rows without an answer.
        num_prompt_tokens: Tokens of the prompts that this process has answered.
        num_new_tokens: Tokens that it has generated, end tokens included.
        duration_s: What that took, model loaded.
        tok_per_s: New tokens by that; None where there are none.
        output: The file of answers; None for stdout.
        model: The model as named or found.
        base: Base model of an adapter; None for a whole model.
        seed: Seed that those of the groups come from; None where nothing was drawn.
    """

    num_rows: int
    num_answered: int
    num_resumed: int
    num_failed: int
    num_prompt_tokens: int
    num_new_tokens: int
    duration_s: float
    tok_per_s: float | None
    output: str | None
    model: str
    base: str | None
    seed: int | None
