"""Failures become text with a status, and interruptions pass."""

import gc
import weakref

import pytest
import torch

from dsft.bench.attempt import Failure, attempt
from dsft.core.errors import DoesNotFitError, ExitCode, ModelError, NoGpuError


def failing(error: BaseException):
    def work() -> None:
        raise error

    return work


def test_work_that_succeeds_gives_its_value() -> None:
    assert attempt(lambda: 3) == 3


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "out of memory in step 2: CUDA out of memory. Tried",
        ),
        (DoesNotFitError("needs 30.0 GiB of 23.5 GiB"), "does not fit: needs 30.0 GiB of 23.5 GiB"),
        (ModelError("There is no model x.", "Check it."), "failed in step 2: There is no model x. Check it."),
        (ValueError("bad\nlines"), "failed in step 2: ValueError: bad"),
        (ValueError(), "failed in step 2: ValueError"),
    ],
)
def test_a_failure_says_what_and_where(error: Exception, told: str) -> None:
    failure = attempt(failing(error))
    assert isinstance(failure, Failure)
    assert failure.tell(2) == told


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("There is no model x."), ExitCode.WRONG_INPUT),
        (NoGpuError("There is no GPU."), ExitCode.NO_GPU),
        (DoesNotFitError("too large"), ExitCode.DOES_NOT_FIT),
        (torch.OutOfMemoryError("CUDA out of memory"), ExitCode.DOES_NOT_FIT),
        (ValueError("odd"), ExitCode.FAILURE),
    ],
)
def test_a_failure_keeps_the_exit_code_of_its_error(error: Exception, code: ExitCode) -> None:
    failure = attempt(failing(error))
    assert isinstance(failure, Failure)
    assert failure.exit_code == code


def test_before_the_first_step_is_said_so() -> None:
    failure = Failure("out_of_memory", "x")
    assert failure.tell(0) == "out of memory before the first step: x"
    assert failure.tell() == "out of memory: x"


def test_ctrl_c_ends_the_bench() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempt(failing(KeyboardInterrupt()))


def test_what_a_failed_step_held_is_free_afterwards() -> None:
    held: list[weakref.ref] = []

    def work() -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("full")

    failure = attempt(work)
    gc.collect()
    assert isinstance(failure, Failure)
    assert held[0]() is None
