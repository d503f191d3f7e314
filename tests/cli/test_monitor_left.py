"""The live screen is left: what remains of it on the terminal; and terminals on which there is none."""

from pathlib import Path

import pytest

from tests.terminal import ENTER_SCREEN, LEAVE_SCREEN, Terminal, monitor_command

BRIEF = ("--interval", "0.2", "--duration", "0.7")


def test_alerts_that_fired_stand_below_the_screen_that_was_left(tmp_path: Path) -> None:
    command = monitor_command("h200", *BRIEF, "--alert", "temp>20", "--alert", "temp>200", "--alert", "vram>1")
    with Terminal(command, 120, 24, tmp_path) as terminal:
        assert terminal.wait_for_end() == 4
        screen, _, after = terminal.screen.raw.rpartition(LEAVE_SCREEN)
        assert screen.count(ENTER_SCREEN) == 1 and b"alert: " not in screen
        told = [line for line in terminal.screen.text.splitlines() if line.startswith("alert: ")]
        assert [line.split(" ", 2)[2].partition(" is ")[0] for line in told] == ["GPU 0: temp", "GPU 0: vram"]
        assert after.count(b"alert: ") == 2


def test_alerts_are_told_after_ctrl_c_too(tmp_path: Path) -> None:
    with Terminal(monitor_command("h200", "--alert", "temp>20"), 120, 24, tmp_path) as terminal:
        terminal.wait_for("ALERT")
        terminal.send("\x03")
        assert terminal.wait_for_end() == 130
        assert b"alert: " in terminal.screen.raw.rpartition(LEAVE_SCREEN)[2]


@pytest.mark.parametrize("name", ["", "dumb"])
def test_a_terminal_without_a_name_or_abilities_gets_lines(tmp_path: Path, name: str) -> None:
    with Terminal(monitor_command("h200", *BRIEF), 120, 24, tmp_path, {"TERM": name}) as terminal:
        assert terminal.wait_for_end() == 0
        assert ENTER_SCREEN not in terminal.screen.raw and "host: CPU" in terminal.screen.text


def test_rows_are_refused_where_the_screen_is_and_come_with_quiet(tmp_path: Path) -> None:
    with Terminal(monitor_command("h200", *BRIEF, "--csv", "-"), 120, 24, tmp_path) as terminal:
        assert terminal.wait_for_end() == 2
        assert "--csv - writes to stdout, where the live screen is." in terminal.screen.text
    with Terminal(monitor_command("h200", *BRIEF, "--csv", "-", "--quiet"), 120, 24, tmp_path) as terminal:
        assert terminal.wait_for_end() == 0
        assert terminal.screen.raw.startswith(b"time,gpu_index,")
    assert list(tmp_path.iterdir()) == []
