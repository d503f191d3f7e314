"""The script that times how long `dsft train` takes to its first step: what it reads out of a run."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"

STARTED = {"event": "RunStarted", "device": "a GPU", "validates_first": True}
STEP = {"event": "StepDone", "step": 1, "loss": 2.5}


@pytest.fixture(scope="module")
def script():
    """Make the script importable for this file alone."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import time_train_start

        yield time_train_start
    finally:
        sys.path.remove(str(SCRIPTS))


def test_a_phase_ends_where_the_next_begins_and_the_last_with_the_first_step(script):
    moments = [
        (0.25, {"event": "Phase", "name": "find model and data"}),
        (0.5, {"event": "Phase", "name": "load PyTorch"}),
        (2.0, {"event": "Notice", "text": "A word.", "level": "info"}),
        (3.0, STARTED),
        (4.0, {"event": "Validated", "step": 0, "loss": 3.0}),
        (6.0, STEP),
        (7.0, STEP | {"step": 2, "loss": 2.0}),
        (8.0, {"error": "stopped: SIGTERM after step 2"}),
    ]
    ends_s = {
        "start Python": 0.25,
        "find model and data": 0.5,
        "load PyTorch": 3.0,
        "validate": 4.0,
        "first step": 6.0,
    }
    expected = {"device": "a GPU", "first_loss": 2.5, "ends_s": ends_s, "notices": ["A word."]}
    assert script.read_moments(moments) == expected


def test_without_validation_the_step_follows_the_start(script):
    moments = [(1.0, STARTED | {"validates_first": False}), (2.0, STEP)]
    assert script.read_moments(moments)["ends_s"] == {"start Python": 1.0, "first step": 2.0}


def test_a_run_without_a_step_gives_no_figures(script):
    assert script.read_moments([(1.0, STARTED), (2.0, {"error": "out of memory"})]) is None


def test_medians_are_taken_figure_by_figure(script):
    ends_s = [{"plan": 1.0, "first step": 9.0}, {"plan": 3.0, "first step": 4.0}, {"plan": 2.0, "first step": 5.0}]
    assert script.take_medians(ends_s) == {"plan": 2.0, "first step": 5.0}


def test_a_run_is_timed_up_to_its_first_step_and_ended_there(script, tmp_path: Path):
    found = script.start_run(["--preset", "tiny"], tmp_path, tmp_path / "cache")
    moments_s = list(found["ends_s"].values())
    assert moments_s == sorted(moments_s)
    assert {"load PyTorch", "load and quantize the model", "first step"} <= found["ends_s"].keys()
    assert list((tmp_path / "run").glob("checkpoint-*"))  # it stopped on the way
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_command_that_fails_is_told_with_what_it_said(script, tmp_path: Path):
    with pytest.raises(SystemExit, match="no-such-model"):
        script.start_run(["--model-name", str(tmp_path / "no-such-model")], tmp_path, tmp_path / "cache")
