"""The real `dsft monitor` on a terminal: what its screen shows, and that it leaves the terminal as it was."""

import os
import re
import signal
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.terminal import ENTER_SCREEN, LEAVE_SCREEN, Emulator, Terminal, monitor_command

SIZES = {
    (80, 24): (
        "GPU 0 NVIDIA H200",
        "4.1 of 140.4 GiB",
        "124 of 700 W",
        "33 of 89 °C",
        "PCIe gen 5 ×16",
        "ECC 0 errors",
    ),
    (200, 50): ("GPU 0 NVIDIA H200", "4.1 of 140.4 GiB", "memory, last", "util, last"),
    (40, 15): ("GPU 0 NVIDIA H200", "4.1/140.4 GiB", "33 of 89 °C", "124 of 700 W", "throttle none"),
}


def run_monitor(folder: Path, scenario: str, *options: str, size: tuple[int, int] = (80, 24)) -> Terminal:
    # Where a signal may cut a write short.
    return Terminal(monitor_command(scenario, *options), *size, folder, {"PYTHONUNBUFFERED": "1"})


def assert_restored(terminal: Terminal) -> None:
    assert terminal.modes == terminal.modes_before
    assert terminal.screen.is_restored


@pytest.mark.parametrize("size", SIZES)
def test_the_screen_is_right_at_each_size_and_q_ends_it(tmp_path: Path, size: tuple[int, int]) -> None:
    with run_monitor(tmp_path, "h200", size=size) as terminal:
        screen = terminal.wait_for(*SIZES[size], "535", "CPU", "RAM", "q quit")
        assert len(screen.lines) == size[1]
        assert screen.lines[-1].startswith("q quit") and len(screen.lines[-1]) == size[0]
        assert re.search(r"\d\d:\d\d:\d\d$", screen.lines[-1])
        assert terminal.modes[3] & (termios.ICANON | termios.ECHO) == 0
        terminal.send("q")
        assert terminal.wait_for_end() == 0
        assert_restored(terminal)
        assert screen.raw.endswith(LEAVE_SCREEN)


def test_twenty_processes_are_scrolled_and_sorted_and_the_window_resized(tmp_path: Path) -> None:
    with run_monitor(tmp_path, "busy", "--interval", "30") as terminal:
        first = terminal.wait_for("most memory first", "more below", "--hub-token ***")
        assert "hunter22" not in first.text
        num_below = int(re.search(r"(\d+) more below", first.text)[1])  # type: ignore[index]
        terminal.send("\x1b[B\x1b[B")
        terminal.wait_for("2 above", f"{num_below - 2} more below")
        terminal.send("s")
        terminal.wait_for("by PID", f"{num_below} more below")
        terminal.resize(100, 40)
        screen = terminal.wait_until(lambda screen: screen.text.count("train.py") == 20)
        assert "more below" not in screen.text and max(map(len, screen.lines)) == 100
        terminal.resize(40, 15)
        terminal.wait_until(lambda screen: max(map(len, screen.lines)) == 40 and screen.lines[-1].startswith("q quit"))
        terminal.resize(20, 5)
        terminal.wait_for("4.1/140.4 GiB", "33 °C 12", "q quit")
        terminal.send("q")
        assert terminal.wait_for_end() == 0
        assert_restored(terminal)


@pytest.mark.parametrize(("number", "code"), [(None, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_ends_it_with_its_code(tmp_path: Path, number: signal.Signals | None, code: int) -> None:
    with run_monitor(tmp_path, "two") as terminal:
        terminal.wait_for("GPU 1 NVIDIA H200", "q quit")
        if number is None:
            terminal.send("\x03")
        else:
            terminal.kill(number)
        assert terminal.wait_for_end() == code
        assert_restored(terminal)
        assert terminal.screen.raw.endswith(LEAVE_SCREEN)  # nothing is told: that is the usual way to end it


def test_a_bug_in_a_sample_is_told_after_the_screen(tmp_path: Path) -> None:
    code = (
        "import sys; from dsft.monitor.sampler import Sampler; from dsft.cli.app import main\n"
        "read = Sampler.read; reads = []\n"
        "def fail(self):\n"
        "    reads.append(0)\n"
        "    return read(self) if len(reads) < 3 else 1 / 0\n"
        "Sampler.read = fail\n"
        "sys.exit(main(['monitor', '--interval', '0.1']))\n"
    )
    with Terminal([sys.executable, "-c", code], 80, 24, tmp_path) as terminal:
        assert terminal.wait_for_end() == 1
        assert_restored(terminal)
        _, _, told = terminal.screen.raw.rpartition(LEAVE_SCREEN)
        assert b"ZeroDivisionError" in told


def test_a_gpu_that_is_lost_is_a_sentence_while_the_other_goes_on(tmp_path: Path) -> None:
    with run_monitor(tmp_path, "lost", "--interval", "0.2", "--duration", "1", size=(100, 30)) as terminal:
        assert terminal.wait_for_end() == 5
        assert_restored(terminal)
        screen, _, told = terminal.screen.raw.rpartition(LEAVE_SCREEN)
        assert b"error: " in told and b"GPU 1" in told
        shown = Emulator(100, 30)
        shown.feed(screen)
        assert "of 24.0 GiB" in shown.text and "of 140.4 GiB" not in shown.text


def test_without_a_driver_the_host_is_shown_until_q_and_the_code_says_so(tmp_path: Path) -> None:
    with run_monitor(tmp_path, "no_driver") as terminal:
        screen = terminal.wait_for("GPUs", "CPU", "RAM", "q quit")
        assert "NVIDIA" in screen.text and "processes" not in screen.text
        terminal.send("q")
        assert terminal.wait_for_end() == 5
        assert_restored(terminal)


def test_ctrl_z_gives_the_shell_a_usable_terminal_and_fg_comes_back(tmp_path: Path) -> None:
    with Terminal(["bash", "--norc", "--noprofile", "--noediting"], 100, 30, tmp_path) as terminal:
        terminal.wait_for("$")
        terminal.send("stty -g > before\n")
        terminal.send(" ".join(monitor_command("h200")) + "\n")
        terminal.wait_for("GPU 0 NVIDIA H200", "q quit")
        terminal.send("\x1a")
        terminal.wait_for("Stopped")
        terminal.send("stty -g > stopped\n")
        wait_for_file(tmp_path / "stopped", terminal)
        before, stopped = ((tmp_path / name).read_text() for name in ("before", "stopped"))
        assert before == stopped != ""
        assert terminal.screen.is_restored

        num_screens = terminal.screen.raw.count(ENTER_SCREEN)
        terminal.resize(120, 30)
        terminal.send("fg\n")
        terminal.wait_until(lambda screen: screen.raw.count(ENTER_SCREEN) > num_screens)
        terminal.wait_until(lambda screen: screen.lines[-1].startswith("q quit") and len(screen.lines[-1]) == 120)
        assert terminal.modes[3] & (termios.ICANON | termios.ECHO) == 0
        terminal.send("\x1a")
        terminal.wait_until(lambda screen: screen.raw.count(b"Stopped") == 2)
        # It must not draw over the shell, so it stops again.
        terminal.send('bg; until [ "$(jobs -s)" ]; do sleep 0.1; done; jobs -s\n')
        terminal.wait_until(lambda screen: screen.raw.count(b"Stopped") >= 3)
        assert terminal.screen.raw.count(ENTER_SCREEN) == num_screens + 1
        terminal.send("fg\n")
        terminal.wait_until(lambda screen: screen.raw.count(ENTER_SCREEN) >= num_screens + 2)  # it may draw twice
        terminal.send("q")
        terminal.wait_until(lambda screen: screen.is_restored and bool(terminal.modes[3] & termios.ECHO))
        terminal.send("stty -g > after; exit\n")
        terminal.wait_for_end()
        assert (tmp_path / "after").read_text() == before


def test_a_stop_that_nobody_announced_is_drawn_over_again(tmp_path: Path) -> None:
    with run_monitor(tmp_path, "h200", "--interval", "30") as terminal:
        screen = terminal.wait_for("q quit")
        terminal.kill(signal.SIGSTOP)
        modes = terminal.modes
        terminal.set_modes(terminal.modes_before)
        terminal.kill(signal.SIGCONT)
        terminal.wait_until(lambda screen: screen.raw.count(ENTER_SCREEN) == 2)
        terminal.wait_until(lambda screen: screen.raw.count(b"every 30 s") == 2)
        assert terminal.modes == modes
        terminal.send("q")
        assert terminal.wait_for_end() == 0
        assert screen.is_restored and terminal.modes == terminal.modes_before


def test_a_terminal_that_is_closed_ends_it(tmp_path: Path) -> None:
    terminal = run_monitor(tmp_path, "h200", "--interval", "0.1", "--csv", "log.csv")
    with terminal:
        terminal.wait_for("q quit")
    assert not is_alive(terminal.process.pid)


def wait_for_file(path: Path, terminal: Terminal) -> None:
    terminal.wait_until(lambda _: path.exists() and path.read_text().endswith("\n"))


def is_alive(pid: int) -> bool:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True
