"""A training run as the monitor sees it from another process: from loading until it is killed or ends."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft.core.paths import live_runs_dir
from dsft.monitor.runs import LiveRuns
from dsft.monitor.sample import RunSample

TRAIN = ("train", "--preset", "tiny", "--quiet", "--max-samples", "16", "--dataloader-num-workers", "1")
STEPS = ("--max-steps", "10", "--epochs", "5", "--save-steps", "3")


@contextmanager
def training(folder: Path, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "dsft", *TRAIN, *STEPS, *flags]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def watch(
    process: "subprocess.Popen[str]", runs: LiveRuns, is_enough: Callable[[list[RunSample]], bool]
) -> list[RunSample]:
    """Return what the monitor saw of a run, until that is enough or the run has ended."""
    seen: list[RunSample] = []
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s:
        now = runs.read()
        seen += now
        if is_enough(seen) or (seen and seen[-1].outcome is not None):
            return seen
        assert now or process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    raise AssertionError(f"only this was seen: {seen[-1:]}")


def test_a_run_is_followed_until_it_is_killed_and_again_until_its_end(tmp_path: Path) -> None:
    runs = LiveRuns()
    with training(tmp_path) as process:
        seen = watch(process, runs, lambda seen: bool(seen) and (seen[-1].step or 0) >= 4)
        process.kill()
        process.wait(timeout=60)
        [killed] = runs.read()
        assert (killed.outcome, killed.pid) == ("killed", process.pid)
        assert killed.step is not None and seen[-1].step is not None and killed.step >= seen[-1].step
        assert LiveRuns().read() == ()
    assert {sample.pid for sample in seen} == {process.pid}
    assert seen[0].stage == "loading" and seen[0].step is None
    assert {"loading", "validating", "training"} <= {sample.stage for sample in seen}
    reached = [sample.step for sample in seen if sample.step is not None]
    assert reached == sorted(reached)
    assert set(reached) >= {0, 3}
    best = seen[-1].best_validation_loss
    assert best is not None

    with training(tmp_path, "--resume") as process:
        seen = watch(process, LiveRuns(), lambda _seen: False)
        assert process.wait(timeout=60) == 0
    assert {sample.pid for sample in seen} == {process.pid}
    assert seen[0].stage == "loading" and seen[0].step is None
    first, last = next(sample for sample in seen if sample.step is not None), seen[-1]
    assert first.first_step == 3
    assert first.best_validation_loss is not None and first.best_validation_loss <= best
    assert (last.run_name, last.outcome, last.step, last.num_steps) == ("trained_tiny", "finished", 10, 10)
    assert last.event_log == str(tmp_path / "results_tiny" / "events.jsonl")
    assert len(last.recent_losses) == 7 and last.validation_loss is not None
    assert list(live_runs_dir().iterdir()) == []
