"""A reader that takes nothing any more: signals end the monitor all the same, and what was written before is whole."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from tests.terminal import ENTER_SCREEN, HIDE_CURSOR, LEAVE_SCREEN, SHOW_CURSOR, monitor_command

Process = subprocess.Popen[bytes]


@pytest.fixture
def started() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until_stalled(process: Process, reader: int) -> None:
    """Wait until something was written, and then nothing for ten intervals."""
    deadline_s = time.monotonic() + 30
    since_s, size = time.monotonic(), 0
    while size == 0 or time.monotonic() - since_s < 1.0:
        assert time.monotonic() < deadline_s and process.poll() is None
        now = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, bytes(4)))[0]
        if now != size:
            since_s, size = time.monotonic(), now
        time.sleep(0.02)


def assert_ends(process: Process, numbers: list[signal.Signals], code: int) -> None:
    sent_s = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    assert process.wait(timeout=20) == code
    assert time.monotonic() - sent_s < 3  # it is less than one on a machine that does nothing else


def read_all(descriptor: int) -> bytes:
    read = b""
    while select.select([descriptor], [], [], 0.2)[0]:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # of a pseudo-terminal whose other end is closed
            break
        read += part
        if not part:
            break
    return read


ENDS = [
    ([signal.SIGTERM], 143),
    ([signal.SIGINT], 130),
    ([signal.SIGHUP], 143),
    ([signal.SIGTERM, signal.SIGINT], 143),
]


@pytest.mark.parametrize(("numbers", "code"), ENDS)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_signals_end_it_while_a_pipe_is_not_read(
    started: list[Process], numbers: list[signal.Signals], code: int, unbuffered: str
) -> None:
    command = monitor_command("eight", "--json", "--interval", "0.1")
    variables = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables)
    started.append(process)
    assert process.stdout is not None and process.stderr is not None
    wait_until_stalled(process, process.stdout.fileno())
    assert_ends(process, numbers, code)
    *lines, _ = read_all(process.stdout.fileno()).split(b"\n")  # the last of them was cut
    assert {len(json.loads(line)["gpus"]) for line in lines} == {8}
    assert read_all(process.stderr.fileno()) == b""


def test_alerts_that_nobody_reads_are_no_reason_to_stay(started: list[Process]) -> None:
    alerts = [option for limit in range(600) for option in ("--alert", f"temp>0.0{limit:03}")]
    command = monitor_command("eight", "--quiet", "--interval", "0.1", *alerts)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.append(process)
    assert process.stderr is not None
    wait_until_stalled(process, process.stderr.fileno())
    assert_ends(process, [signal.SIGTERM], 143)


@pytest.mark.parametrize(("numbers", "code"), ENDS)
@pytest.mark.parametrize("is_stopped", [False, True])
def test_signals_end_the_screen_while_the_terminal_is_not_read_and_it_is_left(
    started: list[Process], numbers: list[signal.Signals], code: int, is_stopped: bool
) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    modes_before = termios.tcgetattr(slave)
    variables = os.environ | {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
    command = monitor_command("eight", "--interval", "0.1")
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=variables)
    started.append(process)
    screen = b""
    while ENTER_SCREEN not in screen or b"quit" not in screen:
        assert process.poll() is None and select.select([master], [], [], 20)[0]
        screen += os.read(master, 65536)
    if is_stopped:
        termios.tcflow(slave, termios.TCOOFF)  # as Ctrl-S does
        screen += read_all(master)
        time.sleep(1)
    else:
        wait_until_stalled(process, master)
    assert_ends(process, numbers, code)
    screen += read_all(master)
    assert screen.rfind(LEAVE_SCREEN) > screen.rfind(ENTER_SCREEN)
    assert screen.rfind(SHOW_CURSOR) > screen.rfind(HIDE_CURSOR)
    assert termios.tcgetattr(slave) == modes_before
    os.close(master)
    os.close(slave)
