"""Work that may fail without ending the bench."""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dsft.bench.result import Status
from dsft.core.errors import DoesNotFitError, DsftError, ExitCode, is_out_of_memory

Value = TypeVar("Value")


@dataclass(frozen=True)
class Failure:
    """Why something was not measured.

    Attributes:
        status: What kind of failure.
        detail: What was found; holds nothing but text, so that a failed step's tensors can be freed.
        exit_code: What a process ends with that fails so.
    """

    status: Status
    detail: str
    exit_code: ExitCode = ExitCode.FAILURE

    def tell(self, step: int | None = None) -> str:
        """Return the reason for people.

        Args:
            step: Where steps were running, the step, from 1, or 0 before the first.
        """
        where = "" if step is None else f" in step {step}" if step else " before the first step"
        if self.status == "does_not_fit":
            return f"does not fit: {self.detail}"
        if self.status == "out_of_memory":
            return f"out of memory{where}: {self.detail}"
        return f"failed{where}: {self.detail}"


def attempt(work: Callable[[], Value]) -> Value | Failure:
    """Return what `work` returns, or why it failed; interruptions pass through."""
    try:
        return work()
    except Exception as error:
        if os.environ.get("DSFT_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        return _describe(error)


def _describe(error: Exception) -> Failure:
    first_line = str(error).strip().partition("\n")[0]
    if is_out_of_memory(error):
        return Failure("out_of_memory", first_line or type(error).__name__, ExitCode.DOES_NOT_FIT)
    if isinstance(error, DsftError):
        status: Status = "does_not_fit" if isinstance(error, DoesNotFitError) else "failed"
        return Failure(status, f"{error.found} {error.fix}".strip(), error.exit_code)
    return Failure("failed", f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__)
