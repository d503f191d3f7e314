"""Training runs as the monitor follows them: what it makes of real event logs, and of logs that are in a bad way."""

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

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
    see("stopping")
    recorder.close()


def test_the_final_adapter_and_a_cpu(output: Path) -> None:
    recorder = record(output)
    recorder.tell(dataclasses.replace(STARTED, predicted_memory_bytes=None, validates_first=False))
    assert look().stage == "training"
    recorder.on_step(step_report(10))
    recorder.tell(Phase("save the adapter"))
    sample = look()
    assert (sample.stage, sample.peak_memory_bytes, sample.predicted_memory_bytes) == ("saving", None, None)
    recorder.close()


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
    recorder.close()
    look()
    assert set(used) == {
        *("RunStarted", "Phase", "InterruptRequested", "StepDone", "Validated", "CheckpointSaved", "PlanChanged")
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


def test_time_left_counts_down_from_the_last_step(output: Path) -> None:
    now = datetime.now(UTC)
    text = line("RunStarted", now, first_step=0) + line("StepDone", now, step=1, loss=1.0, eta_s=20.0)
    (output / "events.jsonl").write_text(text + line("Validated", now + timedelta(seconds=4), loss=1.0))
    ages = iter([5.0, 16.0, 30.0, -3.0])
    runs = LiveRuns(clock=lambda: now.timestamp() + next(ages))
    seen = [look(runs) for _ in range(4)]
    assert [sample.eta_s for sample in seen] == pytest.approx([15, 4, 0, 20], abs=0.01)
    assert [sample.last_event_age_s for sample in seen] == pytest.approx([1, 12, 26, 0], abs=0.01)


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


def test_runs_that_end_are_gone_and_their_logs_closed(output: Path, tmp_path: Path) -> None:
    (output / "events.jsonl").write_text(line("RunStarted", first_step=0))
    runs = LiveRuns()
    look(runs)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    other = tmp_path / "other"
    other.mkdir()
    with registered("other", other / "events.jsonl", other, pytest.fail):
        (other / "events.jsonl").write_text(line("RunStarted", first_step=0, model_name="other/model"))
        names = [(sample.run_name, sample.model_name) for sample in runs.read()]
        assert sorted(names) == [("other", "other/model"), ("trained", None)]
    assert [sample.run_name for sample in runs.read()] == ["trained"]
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open


def test_no_state_folder_is_no_runs() -> None:
    assert LiveRuns().read() == ()
