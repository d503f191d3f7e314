"""What exceptions from outside dsft mean to the user."""

import pytest
import torch
from huggingface_hub import get_session

from dsft.cli.errors import report
from dsft.core.errors import ExitCode


def test_an_error_of_the_hub_s_http_library_is_no_bug_of_dsft():
    """Which library that is depends on huggingface_hub's version."""
    error = type("ReadTimeout", (Exception,), {"__module__": type(get_session()).__module__.partition(".")[0]})
    found = report(error("the connection broke"))
    assert (found.kind, found.exit_code) == ("UnreachableHubError", ExitCode.WRONG_INPUT)
    assert found.found == "the model hub gave nothing: the connection broke"
    assert "--dataset FILE" in found.fix


def test_memory_that_torch_does_not_get_on_a_cpu_is_no_bug_of_dsft():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    found = report(raised.value)
    assert (found.kind, found.exit_code) == ("DoesNotFitError", ExitCode.DOES_NOT_FIT)
    assert found.found.startswith(
        "out of memory: can't allocate memory: you tried to allocate 1152921504606846976 bytes"
    )


@pytest.mark.parametrize("word", ["--max-length", "--load-in-4bit", "--device cpu"])
def test_the_way_out_of_too_little_memory_fits_training_inference_and_merging(word):
    assert word in report(MemoryError()).fix


def test_another_runtime_error_is_not_taken_for_memory():
    assert report(RuntimeError("mat1 and mat2 shapes cannot be multiplied")).kind == "UnexpectedError"
