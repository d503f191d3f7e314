"""`dsft bench` as a user runs it, in a process of its own, on the embedded model."""

import json
from pathlib import Path

from tests.conftest import RunDsft

QUICK = ("bench", "--preset", "tiny", "--max-length", "32", "--steps", "2", "--warmup-steps", "1")


def test_a_bench_measures_and_leaves_only_its_file(run_dsft: RunDsft, tmp_path: Path) -> None:
    done = run_dsft(*QUICK, "--ceiling-seconds", "0.1", "--output", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CPU (")
    assert "tok/s" in done.stdout and "TFLOP/s" in done.stdout
    assert done.stderr.startswith("tiny: ")
    [row] = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["rows"]
    durations = [step["step_s"] for step in row["speed"]["steps"]]
    assert len(durations) == 2
    assert min(durations) <= row["speed"]["step_s"]["median"] <= max(durations)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_model_that_is_not_there_is_a_row_and_wrong_input(run_dsft: RunDsft) -> None:
    done = run_dsft(*QUICK, "--model-name", "./nowhere", "--json")
    assert done.returncode == 2
    [row] = json.loads(done.stdout)["rows"]
    assert (row["status"], row["exit_code"], row["speed"]) == ("failed", 2, None)
    assert "There is no model folder ./nowhere" in row["reason"]
