"""Every way to end: exit code, message, hint, and no traceback."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft.cli.app import main
from dsft.core import errors
from dsft.core.errors import ExitCode, RunInterrupted


class LocalEntryNotFoundError(Exception):
    """As huggingface_hub's, which takes long to import."""

    __module__ = "huggingface_hub.errors"


class OutOfMemoryError(RuntimeError):
    """As torch's."""

    __module__ = "torch"


def caused_by(outer: BaseException, inner: BaseException) -> BaseException:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "code", "message", "hint"),
    [
        (errors.DataError("x.jsonl:7: no JSON.", "Correct line 7."), 2, "error: x.jsonl:7: no JSON.", "line 7"),
        (errors.UnreachableHubError("The hub is silent.", "Use a file."), 2, "error: The hub is silent.", "Use"),
        (errors.DoesNotFitError("Too large.", "Halve it."), 3, "error: Too large.", "Halve it."),
        (errors.NoGpuError("No GPU.", "Use the CPU."), 5, "error: No GPU.", "Use the CPU."),
        (errors.CheckpointError("Damaged.", "Use an older one."), 1, "error: Damaged.", "Use an older one."),
        (RunInterrupted("SIGINT", "out/checkpoint-3", 3), 75, "stopped: SIGINT after step 3", "--resume"),
        (KeyboardInterrupt(), 130, "stopped: SIGINT", None),
        (MemoryError(), 3, "error: out of memory", "--max-length"),
        (OutOfMemoryError("CUDA: tried 2 GiB\nmore"), 3, "error: out of memory: CUDA: tried 2 GiB", "--max-length"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied.", "permissions"),
        (LocalEntryNotFoundError("offline"), 2, "error: the model hub gave nothing: offline", "--preset tiny"),
        (caused_by(OSError("no model"), LocalEntryNotFoundError("offline")), 2, "error: the model hub", "--dataset"),
        (ValueError("odd\nvalue"), 1, "error: unexpected error (a bug in dsft): ValueError: odd value", "DSFT_DEBUG=1"),
        (BrokenPipeError(32, "Broken pipe"), 1, "error: Broken pipe.", "Check"),
    ],
)  # fmt: skip
def test_an_exception_ends_with_its_code_message_and_hint(
    fake_run: Any,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
    hint: str | None,
) -> None:
    def fail(sink: object) -> None:
        raise error

    fake_run.behave = fail
    assert main(["train", "--json"]) == code
    captured = capsys.readouterr()
    first, *rest = captured.err.splitlines()
    assert first.startswith(message)
    assert len(rest) == (hint is not None)
    assert hint is None or hint in rest[0]
    told = json.loads(captured.out)["error"]
    assert told["exit_code"] == code
    assert told["found"] in first


def test_debugging_shows_where_it_happened(
    fake_run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(sink: object) -> None:
        raise ValueError("odd")

    fake_run.behave = fail
    monkeypatch.setenv("DSFT_DEBUG", "1")
    assert main(["train", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "in fail" in error


SLOW_RUN = """
import sys, time, types
run = types.ModuleType("dsft.train.run")
def run_train(resolved, *, resume, overwrite, sink):
    from dsft.train.events import Phase
    while True:
        sink(Phase("x" * 500))
        time.sleep(0.002)
run.run_train = run_train
sys.modules["dsft.train.run"] = run
from dsft.cli.app import main
sys.exit(main(["train", "--json"]))
"""


@pytest.fixture
def slow_run(tmp_path: Path) -> "subprocess.Popen[str]":
    """A `dsft train --json` that tells of a phase again and again; its first line is read."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("signal_number", "code"), [(signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGINT, ExitCode.INTERRUPTED)]
)
def test_a_signal_outside_the_training_loop_ends_with_its_code(
    slow_run: "subprocess.Popen[str]", signal_number: signal.Signals, code: ExitCode
) -> None:
    slow_run.send_signal(signal_number)
    _, error = slow_run.communicate(timeout=30)
    assert slow_run.returncode == code
    assert error.splitlines() == [f"stopped: {signal_number.name}; nothing more was saved."]


SHORT_RUN = """
import sys, types
from pathlib import Path
from dsft.train.events import Notice
from tests.train_results import make_result
run = types.ModuleType("dsft.train.run")
def run_train(resolved, *, resume, overwrite, sink):
    sink(Notice("begun", "warning"))
    sys.stdin.read()  # until the test has closed what it closes
    for _ in range(100):
        sink(Notice("x" * 5000, "warning"))
    Path("adapter").touch()
    return make_result()
run.run_train = run_train
sys.modules["dsft.train.run"] = run
from dsft.cli.app import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("mode", "closed"), [("--json", "stdout"), ("--quiet", "stderr")])
def test_a_run_goes_on_to_its_end_without_its_reader_and_ends_quietly(tmp_path: Path, mode: str, closed: str) -> None:
    command = [sys.executable, "-c", SHORT_RUN, mode]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:
        lost, kept = (process.stdout, process.stderr) if closed == "stdout" else (process.stderr, process.stdout)
        assert process.stdin is not None and lost is not None and kept is not None
        assert "begun" in lost.readline()
        lost.close()
        process.stdin.close()
        rest = kept.read()
        assert process.wait(timeout=30) == 0
    assert (tmp_path / "adapter").exists()
    assert rest == ""


@pytest.fixture(params=["pipe", "local socket", "TCP socket", "reset TCP socket"])
def unread(request: pytest.FixtureRequest) -> Iterator[int]:
    """A file descriptor whose reader is gone."""
    if request.param == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        yield writer
        os.close(writer)
        return
    here, there = socket.socketpair() if request.param == "local socket" else tcp_pair()
    with here:
        if request.param.startswith("reset"):
            there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()
        yield here.fileno()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        return here, server.accept()[0]


@pytest.mark.parametrize(
    "args", [["--help"], ["train", "--help"], ["--version"], ["monitor", "--json", "--interval", "0.1"]]
)
def test_what_nobody_reads_ends_quietly(args: list[str], unread: int) -> None:
    command = [sys.executable, "-m", "dsft", *args]
    completed = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (completed.returncode, completed.stderr) == (0, b"")


@pytest.mark.parametrize(("args", "code"), [(["--help"], 0), (["infer", "x"], 2), (["infer", "x", "--json"], 2)])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_the_shell_has_closed_is_no_error(
    tmp_path: Path, args: list[str], code: int, closed: str
) -> None:
    completed = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-m", "dsft", *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.returncode == code
    lines = completed.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ([] if code == 0 or "2>&-" in closed else ["error", "hint"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_failure() -> None:
    with Path("/dev/full").open("wb") as full:
        completed = subprocess.run(
            [sys.executable, "-m", "dsft", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert completed.returncode == ExitCode.FAILURE
    assert completed.stderr.startswith("error: No space left on device")


def test_the_handler_of_sigterm_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    main(["--version"])
    assert signal.getsignal(signal.SIGTERM) is before
