"""The event log of a run, and how it ends."""

import json
from pathlib import Path

import pytest

from dsft.core.errors import NonFiniteLossError, RunInterrupted
from dsft.train.events import Phase
from dsft.train.recorder import RunRecorder


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "finished"),
        (RunInterrupted("SIGINT", "checkpoint-3", 3), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (NonFiniteLossError("The loss is NaN."), "failed"),
    ],
)
def test_the_last_line_tells_how_the_run_ended(tmp_path: Path, error: BaseException | None, outcome: str) -> None:
    told = []
    caught = None
    try:
        with RunRecorder(told.append, tmp_path / "events.jsonl", 10, None) as recorder:
            recorder.tell(Phase("save the adapter"))
            if error is not None:
                raise error
    except BaseException as raised:
        caught = raised
    assert caught is error
    phase, end = read_log(tmp_path / "events.jsonl")
    assert (phase["event"], end["event"], end["outcome"]) == ("Phase", "RunEnded", outcome)
    assert told == [Phase("save the adapter")]


def test_a_disk_that_is_full_at_the_end_hides_no_other_error() -> None:
    with pytest.raises(KeyboardInterrupt), RunRecorder(lambda _: None, Path("/dev/full"), 10, None):
        raise KeyboardInterrupt
