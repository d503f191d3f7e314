"""Training runs as the monitor follows them: what it makes of real event logs, and of logs that are in a bad way."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dsft.core.errors import RunInterrupted
from dsft.core.gpu import GpuMemory
from dsft.core.live_runs import registered
from dsft.core.memory.plan import ExecutionPlan
from dsft.monitor import event_log
from dsft.monitor.runs import LiveRuns
from dsft.monitor.sample import RunSample
from dsft.train import events
from dsft.train.events import InterruptRequested, Notice, Phase, RunStarted
from dsft.train.recorder import RunRecorder
from dsft.train.recovery import PlanChange
from dsft.train.reports import StepReport, ValidationReport

PLAN = ExecutionPlan(
    micro_batch_size=4,
    micro_batch_tokens=4096,
    splits_by_tokens=True,
    num_recomputed=0,
    pages_optimizer=False,
    validation_tokens=4096,
)
STARTED = RunStarted(
    run_name="trained",
    model_name="a/model",
    device="A card",
    precision="bf16",
    attention="flash",
    optimizer="AdamW",
    num_steps=10,
    first_step=0,
    num_epochs=2.5,
    effective_batch_size=16,
    micro_batch_size=4,
    num_train_samples=64,
    num_validation_samples=8,
    num_trainable_parameters=1,
    num_parameters=2,
    predicted_memory_bytes=9_000,
    validates_first=True,
)


class Card:
    """GPU memory that is read as the next value of a list."""

    def __init__(self, *used_bytes: int) -> None:
        self._used_bytes = iter(used_bytes)

    def read(self) -> GpuMemory:
        return GpuMemory(next(self._used_bytes), 24_000)


def step_report(step: int, loss: float | None = None) -> StepReport:
    return StepReport(step, step / 4, loss if loss is not None else 3 - step / 10, 0.3, 1e-4, 600, 300, 0.5)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """The output folder of a run that goes on in this process."""
    folder = tmp_path / "results"
    folder.mkdir()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    with registered("trained", folder / "events.jsonl", folder, refuse):
        yield folder


def record(output: Path, card: Any = None) -> RunRecorder:
    return RunRecorder(lambda _event: None, output / "events.jsonl", 10, card)


def look(runs: LiveRuns | None = None) -> RunSample:
    [sample] = (runs or LiveRuns()).read()
    return sample


def without_ages(sample: RunSample) -> RunSample:
    return dataclasses.replace(sample, eta_s=None, last_event_age_s=None)


def line(kind: str, time: datetime | None = None, **fields: Any) -> str:
    told = (time or datetime.now(UTC)).isoformat(timespec="milliseconds")
    return json.dumps({"event": kind, "time": told, **fields}) + "\n"


def write_steps(path: Path, numbers: range, time: datetime | None = None) -> None:
    with path.open("a") as file:
        file.writelines(line("StepDone", time, step=step, loss=float(step)) for step in numbers)


def test_a_run_from_its_beginning_to_its_end_followed_and_opened_anew(output: Path) -> None:
    recorder = record(output, Card(5_000, 7_000, 6_000, 4_000))
    following = LiveRuns()

    def see(stage: str, **fields: Any) -> None:
        sample = look(following)
        assert without_ages(sample) == without_ages(look())
        assert sample.stage == stage
        assert {name: getattr(sample, name) for name in fields} == fields

    see("loading", first_step=None, step=None, last_event_age_s=None)
    recorder.tell(STARTED)
    see("validating", pid=os.getpid(), run_name="trained", model_name="a/model", device="A card", num_epochs=2.5)
    see("validating", first_step=0, step=0, num_steps=10, loss=None, eta_s=None, predicted_memory_bytes=9_000)
    recorder.on_validation(ValidationReport(0, 3.5, 300, True, 0.1))
    see("training", validation_loss=3.5, best_validation_loss=3.5)
    recorder.on_step(step_report(1))
    see("training", step=1, epoch=0.25, loss=2.9, recent_losses=(2.9,), step_s=0.5, tok_per_s=1200.0)
    recorder.on_step(step_report(2), validates_next=True, saves_next=True)
    see("validating", step=2, recent_losses=(2.9, 2.8), peak_memory_bytes=7_000)
    recorder.on_validation(ValidationReport(2, 3.75, 300, False, 0.1))
    see("saving", validation_loss=3.75, best_validation_loss=3.5)
    recorder.on_checkpoint(2, output / "checkpoint-2")
    see("training")
    recorder.on_step(step_report(3), saves_next=True)
    see("saving", step=3, peak_memory_bytes=7_000)
    recorder.on_plan_change(PlanChange(4, PLAN, dataclasses.replace(PLAN, num_recomputed=3), "out of memory"), 8_000)
    see("saving", predicted_memory_bytes=8_000, peak_memory_bytes=None)
    recorder.tell(Notice("Something is remarkable."))
    recorder.on_step(step_report(4))
    see("training", predicted_memory_bytes=8_000, peak_memory_bytes=4_000)
    recorder.tell(InterruptRequested("SIGTERM"))
    see("stopping")
    recorder.on_checkpoint(4, output / "checkpoint-4")
    see("stopping", outcome=None, ended=None)
    with pytest.raises(RunInterrupted), recorder:
        raise RunInterrupted("SIGTERM", "checkpoint-4", 4)
    see("stopping", outcome="stopped", step=4, loss=2.6, eta_s=None, tok_per_s=None)


def test_the_final_adapter_and_a_cpu(output: Path) -> None:
    recorder = record(output)
    recorder.tell(dataclasses.replace(STARTED, predicted_memory_bytes=None, validates_first=False))
    assert look().stage == "training"
    recorder.on_step(step_report(10))
    recorder.tell(Phase("save the adapter"))
    sample = look()
    assert (sample.stage, sample.peak_memory_bytes, sample.predicted_memory_bytes) == ("saving", None, None)
    with recorder:
        pass


def test_every_field_that_is_read_is_one_that_train_writes(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, set[str]] = defaultdict(set)

    class Recording(dict):
        def get(self, key: str, default: Any = None) -> Any:
            used[self["event"]].add(key)
            return super().get(key, default)

    parse = event_log._parse
    monkeypatch.setattr(event_log, "_parse", lambda line: Recording(parse(line)))
    recorder = record(output, Card(5_000))
    for told in (STARTED, Phase("save the adapter"), InterruptRequested("SIGINT")):
        recorder.tell(told)
    recorder.on_step(step_report(1))
    recorder.on_validation(ValidationReport(1, 3.5, 300, True, 0.1))
    recorder.on_checkpoint(1, output)
    recorder.on_plan_change(PlanChange(2, PLAN, PLAN, "out of memory"), 1)
    with recorder:
        pass
    look()
    assert set(used) == {
        *(
            "RunStarted",
            "Phase",
            "InterruptRequested",
            "StepDone",
            "Validated",
            "CheckpointSaved",
            "PlanChanged",
            "RunEnded",
        )
    }
    assert len(used["StepDone"]) > 8 and len(used["RunStarted"]) > 5 and len(used["Validated"]) > 2
    for kind, keys in used.items():
        written = {field.name for field in dataclasses.fields(getattr(events, kind))}
        assert keys - {"event", "time"} <= written, kind


@pytest.mark.parametrize("block_bytes", [7, 64, 1000, 256 * 1024])
def test_a_long_log_is_opened_at_its_end(output: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(event_log, "_BLOCK_BYTES", block_bytes)
    log = output / "events.jsonl"
    log.write_text(line("RunStarted", first_step=0, num_steps=500, validates_first=False))
    write_steps(log, range(1, 101))
    with log.open("a") as file:
        file.write(line("Validated", loss=0.5, is_best=True) + line("Validated", loss=0.75, is_best=False))
        file.write(line("PlanChanged", predicted_memory_bytes=77))
    write_steps(log, range(101, 301))
    sample = look()
    assert sample.recent_losses == tuple(float(step) for step in range(237, 301))
    assert (sample.step, sample.num_steps) == (300, 500)
    assert (sample.validation_loss, sample.best_validation_loss) == (0.75, 0.5)
    assert sample.predicted_memory_bytes == 77


def test_only_what_is_needed_of_a_long_log_is_parsed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = output / "events.jsonl"
    log.write_text(line("RunStarted", first_step=0))
    write_steps(log, range(1, 5_001))
    parsed = []
    parse = event_log._parse

    def count(content: bytes) -> Any:
        parsed.append(content)
        return parse(content)

    monkeypatch.setattr(event_log, "_parse", count)
    runs = LiveRuns()
    assert look(runs).step == 5_000
    assert len(parsed) < 70
    parsed.clear()
    assert look(runs).step == 5_000
    write_steps(log, range(5_001, 5_003))
    assert look(runs).step == 5_002
    assert len(parsed) == 2


def test_a_resumed_run_shows_nothing_of_the_process_before_but_its_best_loss(output: Path) -> None:
    log = output / "events.jsonl"
    before = datetime.now(UTC) - timedelta(minutes=1)
    log.write_text(line("RunStarted", before, first_step=0, predicted_memory_bytes=5))
    write_steps(log, range(1, 4), before)
    with log.open("a") as file:
        file.write(line("Validated", before, step=3, loss=0.5, is_best=True))
        file.write(line("InterruptRequested", before, signal_name="SIGINT"))
    following = LiveRuns()
    for runs in (following, None):
        sample = look(runs)
        assert (sample.stage, sample.step, sample.recent_losses, sample.num_steps) == ("loading", None, (), None)
        assert sample.best_validation_loss is None
    with log.open("a") as file:
        file.write(line("RunStarted", first_step=2, num_steps=9, validates_first=False))
    for runs in (following, None):
        sample = look(runs)
        assert (sample.stage, sample.step, sample.first_step, sample.recent_losses) == ("training", 2, 2, ())
        assert (sample.best_validation_loss, sample.validation_loss) == (0.5, None)
        assert sample.predicted_memory_bytes is None
    write_steps(log, range(3, 4))
    assert look(following).recent_losses == look().recent_losses == (3.0,)


def test_a_run_that_begins_anew_in_an_old_log_has_no_best_loss_of_it(output: Path) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    old = line("RunStarted", before, first_step=0) + line("Validated", before, loss=0.5, is_best=True)
    (output / "events.jsonl").write_text(old + line("RunStarted", first_step=0))
    assert look().best_validation_loss is None


def test_a_log_that_is_not_there_yet_or_can_t_be_seen_from_here(output: Path) -> None:
    assert look().stage == "loading"
    output.rmdir()  # as in a container that this process is not in
    assert look().stage == "unknown"


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_endless_link(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_folder, make_pipe, make_endless_link])
def test_what_is_no_log_can_t_be_read(output: Path, make: Any) -> None:
    make(output / "events.jsonl")
    assert look().stage == "unknown"


def test_half_a_line_waits_for_its_rest(output: Path) -> None:
    log = output / "events.jsonl"
    first, second = line("RunStarted", first_step=0), line("StepDone", step=1, loss=1.5)
    following = LiveRuns()
    whole = first + second
    for end in range(0, len(whole) + 1, 5):
        log.write_text(whole[:end])
        assert without_ages(look(following)) == without_ages(look())
        assert look().stage == ("loading" if end < len(first) else "training")
    log.write_text(whole)
    assert look(following).step == look().step == 1


def test_a_log_that_is_replaced_or_cut_is_read_anew(output: Path) -> None:
    log = output / "events.jsonl"
    log.write_text(line("RunStarted", first_step=0))
    write_steps(log, range(1, 4))
    runs = LiveRuns()
    assert look(runs).recent_losses == (1.0, 2.0, 3.0)
    log.unlink()
    assert look(runs).step == 3  # its process goes on writing into it
    log.write_text(line("RunStarted", first_step=0))
    write_steps(log, range(7, 20))
    assert look(runs).recent_losses == tuple(float(step) for step in range(7, 20))
    with log.open("r+") as file:
        file.truncate(0)
    assert look(runs).stage == "loading"
    log.write_text(line("RunStarted", first_step=0) + line("StepDone", step=1, loss=0.5))
    assert look(runs).recent_losses == (0.5,)


def test_time_left_counts_down_from_the_last_step_until_the_run_is_overdue(output: Path) -> None:
    now = datetime.now(UTC)
    steps = line("StepDone", now, step=1, loss=1.0, eta_s=20.0, tok_per_s=900.0, step_s=5.0)
    text = line("RunStarted", now, first_step=0) + steps
    (output / "events.jsonl").write_text(text + line("Validated", now + timedelta(seconds=4), loss=1.0))
    ages = iter([5.0, 16.0, 24.0, 28.9, 29.1, 90.0, -3.0])
    runs = LiveRuns(clock=lambda: now.timestamp() + next(ages))
    seen = [look(runs) for _ in range(7)]
    assert [sample.eta_s for sample in seen[:4]] == pytest.approx([15, 4, 0, 0], abs=0.01)
    assert [sample.is_overdue for sample in seen] == [False] * 4 + [True, True, False]
    assert [(sample.eta_s, sample.tok_per_s) for sample in seen[4:]] == [(None, None), (None, None), (20.0, 900.0)]
    assert [sample.last_event_age_s for sample in seen] == pytest.approx([1, 12, 20, 24.9, 25.1, 86, 0], abs=0.01)


@pytest.mark.parametrize(
    ("step", "age_s", "is_overdue"),
    [
        ({"step_s": 0.1}, 4.9, False),
        ({"step_s": 0.1}, 5.1, True),
        ({"step_s": 20.0}, 99.0, False),
        ({"step_s": 20.0}, 101.0, True),
        ({"step_s": 0.1, "validates_next": True}, 299.0, False),
        ({"step_s": 0.1, "validates_next": True}, 301.0, True),
        ({"step_s": 0.1, "saves_next": True}, 299.0, False),
        ({}, 299.0, False),
        ({}, 301.0, True),
    ],
)
def test_what_takes_its_time_may_be_silent_for_longer(
    step: dict[str, Any], age_s: float, is_overdue: bool, output: Path
) -> None:
    now = datetime.now(UTC)
    text = line("RunStarted", now, first_step=0) + line("StepDone", now, step=1, eta_s=1e4, tok_per_s=9.0, **step)
    (output / "events.jsonl").write_text(text)
    sample = look(LiveRuns(clock=lambda: now.timestamp() + age_s))
    assert sample.is_overdue == is_overdue
    assert (sample.eta_s is None, sample.tok_per_s is None) == (is_overdue, is_overdue)


def test_a_run_that_loads_is_never_overdue(output: Path) -> None:
    assert not look(LiveRuns(clock=lambda: datetime.now(UTC).timestamp() + 3600)).is_overdue


def test_events_of_another_kind_are_no_failure_and_no_numbers(output: Path) -> None:
    log = output / "events.jsonl"
    text = line("RunStarted", first_step="0", num_steps=None, model_name=3, predicted_memory_bytes=1.5)
    text += 'no JSON\n[1]\n{"event": "StepDone"\n\n{"event": ["StepDone"]}\n{"event": "StepDone", "time": 3}\n'
    log.write_text(text)
    for sample in (look(), look()):
        assert (sample.first_step, sample.num_steps, sample.model_name) == (None, None, None)
        assert (sample.predicted_memory_bytes, sample.loss, sample.recent_losses) == (None, None, ())
    with log.open("a") as file:
        file.write(line("StepDone", step=True, loss=math.nan, eta_s=math.inf, epoch=1, tok_per_s=10**400))
        file.write(line("StepDone", step=4, loss=None, eta_s=None, epoch=1))
    sample = look()
    assert (sample.step, sample.loss, sample.eta_s, sample.epoch, sample.recent_losses) == (4, None, None, 1.0, ())


@pytest.mark.parametrize("number", [10**400, -(10**400), 2**53])
def test_integers_without_sense_are_not_told(number: int, output: Path) -> None:
    started = line("RunStarted", first_step=number, num_steps=number, predicted_memory_bytes=number, num_epochs=number)
    step = line("StepDone", step=number, loss=number, eta_s=number, peak_memory_bytes=number, tok_per_s=number)
    (output / "events.jsonl").write_text(started + step)

    sample = look()

    assert sample.stage == "training"
    told = (sample.first_step, sample.num_steps, sample.predicted_memory_bytes, sample.num_epochs, sample.step)
    told += (sample.loss, sample.eta_s, sample.peak_memory_bytes, sample.tok_per_s)
    assert told == (None,) * 9


@contextmanager
def other_run(folder: Path, name: str = "other") -> Iterator[Path]:
    """The event log of another run in this process."""
    folder.mkdir(exist_ok=True)
    with registered(name, folder / "events.jsonl", folder, pytest.fail):
        yield folder / "events.jsonl"


def test_a_run_that_ends_is_kept_with_its_last_figures_and_its_log_closed(output: Path, tmp_path: Path) -> None:
    (output / "events.jsonl").write_text(line("RunStarted", first_step=0))
    runs = LiveRuns()
    look(runs)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    with other_run(tmp_path / "other") as log:
        log.write_text(line("RunStarted", first_step=0, model_name="other/model"))
        names = [(sample.run_name, sample.model_name) for sample in runs.read()]
        assert sorted(names) == [("other", "other/model"), ("trained", None)]
        last = line("StepDone", step=8, loss=0.5, eta_s=0.0, tok_per_s=9.0) + line("RunEnded", outcome="finished")
        with log.open("a") as file:
            file.write(last)
    live, ended = runs.read()
    assert (live.run_name, live.outcome, live.ended) == ("trained", None, None)
    assert (ended.run_name, ended.outcome, ended.step, ended.loss) == ("other", "finished", 8, 0.5)
    assert ended.ended == json.loads(last.splitlines()[-1])["time"]
    assert (ended.eta_s, ended.tok_per_s, ended.last_event_age_s, ended.is_overdue) == (None, None, None, False)
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open
    assert runs.read()[1] == ended
    assert [sample.run_name for sample in LiveRuns().read()] == ["trained"]


REGISTERS = """
import os, signal, sys
from pathlib import Path
from dsft.core.live_runs import registered
folder = Path(sys.argv[1])
with registered("killed", folder / "events.jsonl", folder, print):
    print("begun", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize(("has_begun", "outcome"), [(True, "killed"), (False, "unknown")])
def test_a_run_that_was_killed_is_told_from_others(has_begun: bool, outcome: str, tmp_path: Path) -> None:
    runs = LiveRuns()
    told = datetime.now(UTC) + timedelta(seconds=60)
    with subprocess.Popen([sys.executable, "-c", REGISTERS, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"begun\n"
            if has_begun:
                step = line("StepDone", told, step=3, loss=0.5)
                (tmp_path / "events.jsonl").write_text(line("RunStarted", told, first_step=0, num_steps=90) + step)
            assert look(runs).outcome is None
        finally:
            process.kill()
    sample = look(runs)
    assert (sample.run_name, sample.outcome) == ("killed", outcome)
    assert sample.step == (3 if has_begun else None)
    ended = datetime.fromisoformat(sample.ended or "")
    assert (ended == told.replace(microsecond=told.microsecond // 1000 * 1000)) == has_begun


def test_a_run_whose_process_goes_on_was_not_killed(tmp_path: Path) -> None:
    runs = LiveRuns()
    with other_run(tmp_path / "other") as log:
        log.write_text(line("RunStarted", first_step=0))
        assert look(runs).stage == "training"
    assert look(runs).outcome == "unknown"


@pytest.mark.parametrize("is_followed", [True, False])
def test_a_run_that_fails_before_its_first_step_tells_its_end(is_followed: bool, tmp_path: Path) -> None:
    runs = LiveRuns()
    before = datetime.now(UTC) - timedelta(minutes=1)
    (tmp_path / "other").mkdir()
    earlier = line("RunStarted", before, first_step=0) + line("RunEnded", before, outcome="finished")
    with other_run(tmp_path / "other") as log:
        if is_followed:
            log.write_text(earlier)
        assert (look(runs).stage, look(runs).outcome) == ("loading", None)
        with log.open("a") as file:
            file.write(("" if is_followed else earlier) + line("RunEnded", outcome="failed"))
    assert (look(runs).outcome, look(runs).step) == ("failed", None)


def test_an_outcome_of_another_kind_is_unknown(tmp_path: Path) -> None:
    runs = LiveRuns()
    with other_run(tmp_path / "other") as log:
        look(runs)
        log.write_text(line("RunStarted", first_step=0) + line("RunEnded", outcome="\x1b[2J"))
    assert look(runs).outcome == "unknown"


def test_the_newest_three_ends_are_kept_for_twelve_hours_and_until_the_run_goes_on(tmp_path: Path) -> None:
    now_s = datetime.now(UTC).timestamp()
    runs = LiveRuns(clock=lambda: now_s)
    for number in range(4):
        with other_run(tmp_path / str(number), str(number)) as log:
            log.write_text(line("RunStarted", first_step=0) + line("RunEnded", outcome="finished"))
            written_s = time.time()
            runs.read()
        now_s += 60
        runs.read()
    while time.time() < written_s + 0.01:  # a clock that is set back would make the log one of the run that goes on
        time.sleep(0.01)
    assert [sample.run_name for sample in runs.read()] == ["3", "2", "1"]
    with other_run(tmp_path / "2", "2"):
        assert [(sample.run_name, sample.outcome) for sample in runs.read()][:2] == [("2", None), ("3", "finished")]
        assert len(runs.read()) == 3
        now_s += 60
    assert [sample.run_name for sample in runs.read()] == ["2", "3", "1"]
    now_s += 12 * 3600 - 1
    assert [sample.run_name for sample in runs.read()] == ["2"]
    now_s += 1
    assert runs.read() == ()


def test_no_state_folder_is_no_runs() -> None:
    assert LiveRuns().read() == ()
