"""What signals and exceptions from outside dsft mean to the user."""

import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import get_session

from dsft.cli.app import main
from dsft.cli.errors import Terminated, report
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


HOLD_BACK = """
import sys
from dsft.cli import app
from dsft.core.signals import held_signals

def run(arguments):
    with held_signals():
        print("held", flush=True)
        sys.stdin.readline()
        print("not cut short", flush=True)
    print("went on", flush=True)

app._run = run
sys.exit(app.main([]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_sentence_says_which_signal_came(name):
    found = report(Terminated(name))
    assert (found.kind, found.found, found.exit_code) == ("Terminated", f"{name}; nothing more was saved.", 143)


@pytest.mark.parametrize(
    ("name", "is_ignored", "code", "told"),
    [
        ("SIGTERM", False, 143, "stopped: SIGTERM; nothing more was saved.\n"),
        ("SIGHUP", False, 143, "stopped: SIGHUP; nothing more was saved.\n"),
        ("SIGHUP", True, 0, ""),
    ],
)
def test_a_closed_terminal_is_like_sigterm_held_back_with_it_and_ignored_under_nohup(name, is_ignored, code, told):
    command = [*(("nohup",) if is_ignored else ()), sys.executable, "-c", HOLD_BACK]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        process.send_signal(getattr(signal, name))
        output, error = process.communicate("\n", timeout=60)
    assert (process.returncode, error) == (code, told)
    assert output == "not cut short\n" + ("went on\n" if is_ignored else "")


def test_the_handlers_of_signals_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    main(["--version"])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
