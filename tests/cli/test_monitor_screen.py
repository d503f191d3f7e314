"""The live screen on a pseudo-terminal, with samples made by hand: its loop, keys, size, and how it ends."""

import errno
import fcntl
import io
import os
import pty
import select
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsft.cli.monitor_screen import run_screen
from dsft.cli.output import Output
from dsft.core.errors import ConfigError
from dsft.monitor.config import MonitorConfig
from dsft.monitor.sample import Sample
from tests.cli.monitor_samples import FIRED, MACHINES, draw, make_crowd, make_gpu, make_sample
from tests.terminal import Emulator

WIDTH, HEIGHT = 80, 24


class Desk:
    """This process's stdin and stdout on a pseudo-terminal, and who sits at it.

    Attributes:
        samples: What the sampler gives; the last one for ever.
        on_read: What happens before a sample, by its number.
        taken: What the sink took.
    """

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.emulator = Emulator(WIDTH, HEIGHT)
        self.resize(WIDTH, HEIGHT)
        self.modes_before = self.modes
        self.samples: list[Sample] = [MACHINES["one"]]
        self.on_read: dict[int, Callable[[], None]] = {}
        self.read_s: list[float] = []
        self.taken: list[Sample] = []
        self._is_closed = threading.Event()
        self._reader = threading.Thread(target=self._follow)
        self._reader.start()

    @property
    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.slave)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.emulator.resize(width, height)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def type_later(self, keys: str, delay_s: float = 0.05) -> None:
        threading.Timer(delay_s, self.type, [keys]).start()

    def wait_for(self, words: str) -> None:
        deadline_s = time.monotonic() + 10
        while words not in self.emulator.text:
            assert time.monotonic() < deadline_s, self.emulator.text
            time.sleep(0.005)

    def wait_for_samples(self, count: int) -> None:
        num_before, deadline_s = len(self.read_s), time.monotonic() + 10
        while len(self.read_s) < num_before + count:
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    def read(self) -> Sample:
        self.read_s.append(time.monotonic())
        number = len(self.read_s)
        if number in self.on_read:
            self.on_read[number]()
        return self.samples[min(number, len(self.samples)) - 1]

    def run(self, interval_s: float = 0.1, duration_s: float | None = None) -> Sample:
        config = MonitorConfig(interval_s=interval_s, duration_s=duration_s)
        return self.run_with(config, self.taken.append)

    def run_with(self, config: MonitorConfig, on_sample: Callable[[Sample], None], stdin: str | None = None) -> Sample:
        """Run the screen with this process's streams on the terminal, or stdin on another file."""
        terminal = os.ttyname(self.slave)
        # Not in a fixture: pytest puts its own streams in place when the test itself begins.
        with (
            Path(stdin or terminal).open("rb", buffering=0) as keys,
            Path(terminal).open("wb", buffering=0) as screen,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "stdin", keys)
            stream = io.TextIOWrapper(screen, encoding="utf-8", write_through=True)
            patch.setattr(sys, "stdout", stream)
            try:
                return run_screen(Output(), config, self, on_sample)
            finally:
                stream.flush()  # as main does; nothing is left that can't be written
                stream.detach()
                self.settle()

    def settle(self) -> None:
        """Wait until all that was written is taken over."""
        size = -1
        while size != len(self.emulator.raw):
            size = len(self.emulator.raw)
            time.sleep(0.03)

    def hang_up(self) -> None:
        self._is_closed.set()
        self._reader.join()
        os.close(self.master)
        self.master = -1

    def close(self) -> None:
        self._is_closed.set()
        self._reader.join()
        for descriptor in (self.master, self.slave):
            if descriptor >= 0:
                os.close(descriptor)

    def _follow(self) -> None:
        while not self._is_closed.is_set():
            if select.select([self.master], [], [], 0.02)[0]:
                self.emulator.feed(os.read(self.master, 65536))


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    desk = Desk()
    monkeypatch.setenv("TERM", "xterm-256color")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)}
    yield desk
    desk.close()
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def assert_restored(desk: Desk) -> None:
    assert desk.modes == desk.modes_before
    assert desk.emulator.is_restored


@pytest.mark.parametrize("key", ["q", "\x1b"])
def test_q_and_escape_end_it_and_the_terminal_is_as_it_was(desk: Desk, key: str) -> None:
    desk.on_read[2] = lambda: desk.type(key)
    last = desk.run()
    assert last is desk.taken[-1] and len(desk.taken) == len(desk.read_s) >= 2
    assert "GPU 0 NVIDIA GeForce RTX 4090" in desk.emulator.text
    assert_restored(desk)


def test_keys_come_one_by_one_and_are_not_shown(desk: Desk) -> None:
    seen: list[Any] = []
    desk.on_read[2] = lambda: (seen.append(desk.modes), desk.type("q"))
    desk.run()
    assert seen[0][3] & (termios.ICANON | termios.ECHO) == 0
    assert seen[0][3] & termios.ISIG  # Ctrl-C and Ctrl-Z stay signals


def test_it_ends_with_the_duration_on_a_grid_that_does_not_drift(desk: Desk) -> None:
    started_s = time.monotonic()
    desk.on_read[2] = lambda: time.sleep(0.5)  # two points are missed; nothing makes up for them
    desk.run(interval_s=0.2, duration_s=1.5)
    assert 1.5 <= time.monotonic() - started_s < 3
    # One after 0.2 s; it lasts to 0.7, so that the next comes at 0.8, and none at 1.5, where the time is over.
    points = [round((read_s - desk.read_s[0]) / 0.2, 1) for read_s in desk.read_s]
    assert points[:4] == pytest.approx([0, 1, 4, 5], abs=0.5)
    assert len(points) == 6
    assert_restored(desk)


def test_keys_act_at_once_without_a_new_sample(desk: Desk) -> None:
    desk.samples = [make_sample(gpus=(make_gpu(processes=make_crowd(20)),))]
    steps = [("\x1b[B", "1 above"), ("\x1b[F", "16 above"), ("\x1b[H", "16 more below"), ("\x1b[6~", "4 above"),
             ("s", "by PID"), ("?", "this help"), ("x", "by PID"), ("p", " paused ")]  # fmt: skip

    def sit() -> None:
        for keys, words in steps:
            desk.type(keys)
            desk.wait_for(words)
        desk.type("q")

    person = threading.Thread(target=sit)
    person.start()
    desk.run(interval_s=30)
    person.join()
    assert len(desk.taken) == 1


def test_an_arrow_that_comes_in_pieces_does_not_quit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsft.cli.terminal_keys._ESCAPE_WAIT_S", 60.0)  # however slow this machine is
    desk.samples = [make_sample(gpus=(make_gpu(processes=make_crowd(20)),))]

    def sit() -> None:
        for piece in ("\x1b", "[", "B"):
            desk.type(piece)
            desk.wait_for_samples(2)  # the screen goes on while the rest is waited for
        desk.wait_for("1 above")
        desk.type("q")

    person = threading.Thread(target=sit)
    person.start()
    desk.run(interval_s=0.1)
    person.join()


def test_a_pause_holds_the_screen_while_samples_go_on(desk: Desk) -> None:
    desk.samples = [make_sample(gpus=(make_gpu(temperature_c=degrees),)) for degrees in range(40, 46)]
    shown: list[str] = []
    desk.on_read = {
        3: lambda: desk.type("p"),
        6: lambda: (shown.append(desk.emulator.text), desk.type("p")),
        8: lambda: desk.type("q"),
    }
    desk.run()
    assert "42 of 90 °C" in shown[0] and " paused " in shown[0]
    assert "45 of 90 °C" in desk.emulator.text and " paused " not in desk.emulator.text
    assert len(desk.taken) >= 8


def test_the_bell_rings_once_when_an_alert_begins(desk: Desk) -> None:
    fired = [False, True, True, True]
    desk.samples = [make_sample(alerts=(replace(FIRED, is_fired=is_fired),)) for is_fired in fired]
    desk.run(duration_s=0.55)
    assert desk.emulator.raw.count(b"\a") == 1
    assert "ALERT" in desk.emulator.lines[0]


def test_an_alert_that_begins_in_a_pause_is_shown_at_once(desk: Desk) -> None:
    desk.samples = [make_sample()] * 4 + [make_sample(alerts=(FIRED,))]
    shown: list[str] = []
    desk.on_read = {2: lambda: desk.type("p"), 8: lambda: (shown.append(desk.emulator.text), desk.type("q"))}
    desk.run()
    assert " paused " in shown[0] and shown[0].startswith(" ALERT")


def test_another_size_is_drawn_at_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")  # what a shell exported once is not the size of the window

    def sit() -> None:
        desk.wait_for("every 30 s")
        desk.resize(150, 40)
        os.kill(os.getpid(), signal.SIGWINCH)
        desk.wait_for("memory, last")
        desk.type("q")

    person = threading.Thread(target=sit)
    person.start()
    desk.run(interval_s=30)
    person.join()
    assert max(map(len, desk.emulator.lines)) == 150
    assert len(desk.taken) == 1


def test_nothing_is_done_between_samples(desk: Desk) -> None:
    spent_s: list[float] = []
    desk.type_later("q", 1.2)
    desk.on_read[1] = lambda: spent_s.append(time.thread_time())
    desk.run(interval_s=5)
    assert time.thread_time() - spent_s[0] < 0.2
    assert desk.emulator.raw.count(b"every 5 s") == 1


class Broken(Exception):
    """Stands for a bug."""


@pytest.mark.parametrize("error", [Broken("x"), ConfigError("No GPU 7.", "Give another."), KeyboardInterrupt()])
def test_an_exception_leaves_the_terminal_as_it_was(desk: Desk, error: BaseException) -> None:
    def fail() -> None:
        raise error

    desk.on_read[2] = fail
    with pytest.raises(type(error)):
        desk.run()
    assert_restored(desk)


def test_an_exception_in_the_first_sample_comes_before_the_screen(desk: Desk) -> None:
    def fail() -> None:
        raise Broken

    desk.on_read[1] = fail
    with pytest.raises(Broken):
        desk.run()
    time.sleep(0.05)
    assert desk.emulator.raw == b""


def test_a_full_disk_under_the_csv_file_is_no_lost_terminal(desk: Desk) -> None:
    def write(_sample: Sample) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "samples.csv")

    with pytest.raises(OSError, match=r"samples\.csv"):
        desk.run_with(MonitorConfig(interval_s=0.1), write)


def test_a_terminal_that_goes_away_ends_it_quietly(desk: Desk) -> None:
    def hang_up() -> None:
        desk.wait_for("every 0.1 s")
        desk.hang_up()

    desk.on_read[3] = hang_up
    last = desk.run()
    assert last is desk.taken[-1] and len(desk.taken) == 3


def test_without_a_terminal_on_stdin_there_are_no_keys(desk: Desk) -> None:
    desk.run_with(MonitorConfig(interval_s=0.1, duration_s=0.25), desk.taken.append, stdin=os.devnull)
    assert "Ctrl-C quits" in desk.emulator.text
    assert len(desk.taken) == 3
    assert_restored(desk)


@pytest.mark.parametrize("delay_ms", range(0, 30, 2))
def test_ctrl_c_at_any_moment_leaves_the_terminal_as_it_was(desk: Desk, delay_ms: int) -> None:
    def interrupt() -> None:
        time.sleep(delay_ms / 1000)
        os.kill(os.getpid(), signal.SIGINT)

    draw(MACHINES["one"])  # imports what is imported late; an interrupt in the middle of that is another matter
    desk.on_read[1] = threading.Thread(target=interrupt).start
    with pytest.raises(KeyboardInterrupt):
        desk.run(interval_s=30)
    assert desk.modes == desk.modes_before
    assert desk.emulator.raw == b"" or desk.emulator.is_restored
