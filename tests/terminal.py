"""A terminal for tests: a program on a pseudo-terminal, and what its screen shows."""

import os
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pyte

ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
_WAIT_S = 20.0


class Emulator:
    """Draws what a program sends.

    Attributes:
        raw: All it sent.
    """

    def __init__(self, width: int, height: int) -> None:
        self.raw = b""
        self._num_drawn = 0
        self._screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self._screen)

    def feed(self, data: bytes) -> None:
        self.raw += data

    def resize(self, width: int, height: int) -> None:
        self._draw()
        self._screen.resize(height, width)

    @property
    def lines(self) -> list[str]:
        """The rows of the screen, without the spaces at their ends."""
        self._draw()
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def is_restored(self) -> bool:
        """Whether the program left the alternate screen and shows the cursor, having done otherwise."""
        return (
            self.raw.rfind(LEAVE_SCREEN) > self.raw.rfind(ENTER_SCREEN) >= 0
            and self.raw.rfind(SHOW_CURSOR) > self.raw.rfind(HIDE_CURSOR) >= 0
        )

    def _draw(self) -> None:
        # Only when someone looks: the emulator takes longer for a screen than the monitor does.
        sent = self.raw[self._num_drawn :]
        self._num_drawn += len(sent)
        self._stream.feed(sent)


class Terminal:
    """A program on a pseudo-terminal that controls it.

    Args:
        command: Program and arguments.
        width: Columns.
        height: Rows.
        folder: Where it runs.
        environment: Variables that differ from this process's.
    """

    def __init__(
        self, command: list[str], width: int, height: int, folder: Path, environment: dict[str, str] | None = None
    ) -> None:
        variables = os.environ | {"TERM": "xterm-256color", "LANG": "C.UTF-8", "PS1": "$ ", "HISTFILE": ""}
        self.screen = Emulator(width, height)
        self.process = pexpect.spawn(
            command[0],
            command[1:],
            dimensions=(height, width),
            env=variables | (environment or {}),
            cwd=str(folder),
            timeout=_WAIT_S,
        )
        # Held open, so that the modes can be read when the program has ended.
        self._other_end = os.open(Path(f"/proc/{self.process.pid}/fd/0").readlink(), os.O_RDWR | os.O_NOCTTY)
        self.modes_before = self.modes

    @property
    def modes(self) -> list[Any]:
        return termios.tcgetattr(self._other_end)

    def set_modes(self, modes: list[Any]) -> None:
        termios.tcsetattr(self._other_end, termios.TCSANOW, modes)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._other_end)
        self.process.close(force=True)

    def send(self, keys: str) -> None:
        self.process.send(keys)

    def kill(self, number: signal.Signals) -> None:
        self.process.kill(number)

    def resize(self, width: int, height: int) -> None:
        self.screen.resize(width, height)
        self.process.setwinsize(height, width)

    def wait_until(self, is_so: Callable[[Emulator], bool]) -> Emulator:
        """Read what the program sends until the screen is so."""
        deadline_s = time.monotonic() + _WAIT_S
        while not is_so(self.screen):
            assert time.monotonic() < deadline_s, f"the screen is:\n{self.screen.text}"
            self._read(0.05)
        return self.screen

    def wait_for(self, *words: str) -> Emulator:
        """Read what the program sends until the screen shows all of these words."""
        return self.wait_until(lambda screen: all(word in screen.text for word in words))

    def wait_for_end(self) -> int:
        """Wait until the program has ended; returns its exit code, less than 0 for a signal."""
        deadline_s = time.monotonic() + _WAIT_S
        while self.process.isalive():
            assert time.monotonic() < deadline_s, f"it has not ended; the screen is:\n{self.screen.text}"
            self._read(0.02)
        self._read(0)
        status = self.process.exitstatus
        return -self.process.signalstatus if status is None else status

    def _read(self, timeout_s: float) -> None:
        try:
            self.screen.feed(self.process.read_nonblocking(65536, timeout_s))
        except (pexpect.TIMEOUT, pexpect.EOF):
            return


def monitor_command(scenario: str, *options: str) -> list[str]:
    """Return the command of `dsft monitor` on a machine of tests/nvml_scenarios.py."""
    driver = str(Path(__file__).with_name("monitor_driver.py"))
    return [sys.executable, driver, scenario, "--", "monitor", *options]
