"""Real steps of the embedded model: what is timed, models loaded once, failures as rows, nothing left behind."""

import gc
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsft.bench import measure, plain, session
from dsft.bench.figures import count_useful_flops_per_s
from dsft.bench.memory import MemoryMeter
from dsft.bench.options import BenchOptions, BenchSink, Progress
from dsft.bench.result import BenchResult, RowResult
from dsft.bench.rows import BenchRow, choose_rows
from dsft.bench.run import run_bench
from dsft.bench.setup import RowSetup, prepare_row
from dsft.core.errors import ExitCode
from dsft.core.memory.plan import ExecutionPlan

QUICK = BenchOptions(num_steps=2, num_warmup_steps=1, ceiling_s=0.0, is_profiled=False)


class Heard:
    """Keeps what a bench tells."""

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.rows: list[RowResult] = []
        self.results: list[BenchResult] = []

    def run(self, rows: list[BenchRow], options: BenchOptions = QUICK) -> BenchResult:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dsft.bench.run.hide_gpus", lambda: None)  # other tests of this process may need them
            return run_bench(rows, options, BenchSink(self.progress.append, self.rows.append, self.results.append))


def make_row(name: str = "row", **flags: object) -> BenchRow:
    flags = {"max_length": 24, "per_device_train_batch_size": 2, "lora_r": 4} | flags
    [row] = choose_rows("tiny", None, flags, None, has_gpu=False)
    return replace(row, name=name)


def make_setup(**flags: object) -> RowSetup:
    return prepare_row(make_row(**flags), None, 3, use_random=False, on_rows=lambda num_rows: None)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[RowSetup]:
    """The rows for which a base model was loaded."""
    loaded: list[RowSetup] = []
    load = session.load_base

    def count(setup: RowSetup) -> object:
        loaded.append(setup)
        return load(setup)

    monkeypatch.setattr(session, "load_base", count)
    return loaded


@pytest.fixture(scope="module")
def result() -> BenchResult:
    options = replace(QUICK, num_steps=3, is_profiled=True, ceiling_s=0.05, has_baseline=True)
    return Heard().run([make_row(gradient_accumulation_steps=2)], options)


def test_the_steps_after_the_warm_up_are_kept(result: BenchResult) -> None:
    speed = result.rows[0].speed
    assert speed is not None
    assert len(speed.steps) == 3
    # 2 x 2 sequences of 24 tokens, the first of each no target, in micro-batches of 2.
    assert {(step.num_tokens, step.num_targets, step.num_padded_tokens) for step in speed.steps} == {(96, 92, 96)}
    assert {step.num_micro_batches for step in speed.steps} == {2}


def test_figures_come_from_the_steps(result: BenchResult) -> None:
    [row] = result.rows
    assert row.speed is not None and row.useful_flops is not None and row.ceiling_flops is not None
    durations = sorted(step.step_s for step in row.speed.steps)
    assert row.speed.step_s.median == durations[1]
    assert row.speed.tok_per_s == pytest.approx(96 / durations[1])
    assert row.useful_flops == count_useful_flops_per_s(make_setup().shape, row.speed.steps)
    assert row.ceiling_share == row.useful_flops / row.ceiling_flops
    assert 0 < row.ceiling_share < 1


def test_on_a_cpu_the_wall_clock_tells_where_the_time_goes(result: BenchResult) -> None:
    time = result.rows[0].time
    assert time is not None and time.source == "wall clock"
    assert list(time.shares) == ["data", "forward", "backward", "optimizer and the rest"]
    assert sum(time.shares.values()) == pytest.approx(1)
    assert min(time.shares.values()) >= 0
    assert time.shares["forward"] > 0.05 and time.shares["backward"] > 0.05


def test_a_cpu_has_no_figures_of_gpu_memory(result: BenchResult) -> None:
    [row] = result.rows
    assert (row.predicted, row.measured, row.error_percent) == (None, None, {})
    assert row.host_bytes is not None and row.host_bytes > 50e6


def test_the_plain_path_runs_the_same_samples(result: BenchResult) -> None:
    [row] = result.rows
    assert row.baseline is not None and row.baseline.speed is not None and row.speed is not None
    assert row.baseline.status == "done"
    assert [step.num_tokens for step in row.baseline.speed.steps] == [96] * 3
    assert [step.num_targets for step in row.baseline.speed.steps] == [92] * 3
    assert row.baseline.speedup == row.speed.tok_per_s / row.baseline.speed.tok_per_s


def test_rows_of_one_model_share_it_in_any_order(loads: list[RowSetup]) -> None:
    heard = Heard()
    rows = [make_row("a"), make_row("b", precision="bf16"), make_row("c", lora_r=8, recompute_blocks=2)]
    found = heard.run(rows)
    assert [row.name for row in found.rows] == ["a", "b", "c"]
    assert [row.status for row in found.rows] == ["done"] * 3
    assert [setup.precision for setup in loads] == ["fp32", "bf16"]
    assert [row.name for row in heard.rows] == ["a", "c", "b"]
    plans = [row.plan for row in found.rows]
    assert [(plan.num_recomputed, plan.num_blocks) for plan in plans if plan is not None] == [(0, 4), (0, 4), (2, 4)]


def test_progress_names_row_phase_and_step() -> None:
    heard = Heard()
    heard.run([make_row("only")])
    assert Progress(1, 1, "only", "load and quantize the model") in heard.progress
    steps = [(each.step, each.num_steps) for each in heard.progress if each.phase == "measure"]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_row_out_of_memory_says_where_and_the_next_one_runs(
    loads: list[RowSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = measure._TimedTrainer.training_step

    def fail_in_second_step(self, *args, **kwargs):
        if self.clock.step == 2 and self.plan.num_recomputed == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(measure._TimedTrainer, "training_step", fail_in_second_step)
    found = Heard().run([make_row("large", recompute_blocks=1), make_row("small")])
    large, small = found.rows
    assert large.status == "out_of_memory"
    assert large.reason == "out of memory in step 2: CUDA out of memory. Tried to allocate 3 GiB."
    assert large.speed is None and large.plan is not None
    assert small.status == "done"
    assert len(loads) == 1
    assert found.exit_code == ExitCode.DONE


def let_first_attachment_run_out(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let memory run out once, with LoRA attached by then."""
    attach = module.attach_lora
    attached: list[int] = []

    def run_out(base, settings):
        model = attach(base, settings)
        attached.append(1)
        if len(attached) == 1:
            raise torch.OutOfMemoryError("full")
        return model

    monkeypatch.setattr(module, "attach_lora", run_out)


def test_a_model_left_half_attached_is_loaded_again(loads: list[RowSetup], monkeypatch: pytest.MonkeyPatch) -> None:
    let_first_attachment_run_out(monkeypatch, measure)
    found = Heard().run([make_row("a"), make_row("b")])
    assert [row.status for row in found.rows] == ["out_of_memory", "done"]
    assert found.rows[0].reason == "out of memory before the first step: full"
    assert len(loads) == 2


def test_a_baseline_model_left_half_attached_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    load = session.load_plain
    loaded: list[RowSetup] = []

    def count(setup: RowSetup) -> object:
        loaded.append(setup)
        return load(setup)

    let_first_attachment_run_out(monkeypatch, plain)
    monkeypatch.setattr(session, "load_plain", count)
    found = Heard().run([make_row("a"), make_row("b")], replace(QUICK, has_baseline=True))
    baselines = [row.baseline for row in found.rows]
    assert [baseline.status for baseline in baselines if baseline is not None] == ["out_of_memory", "done"]
    assert len(loaded) == 2


def test_a_row_whose_model_is_missing_does_not_stop_the_others() -> None:
    found = Heard().run([make_row("gone", model_name="./nowhere"), make_row("there")])
    gone, there = found.rows
    assert gone.status == "failed"
    assert gone.reason is not None and gone.reason.startswith("failed: There is no model folder ./nowhere.")
    assert there.status == "done"
    assert (gone.exit_code, there.exit_code) == (ExitCode.WRONG_INPUT, ExitCode.DONE)


def test_a_model_that_can_not_be_loaded_fails_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(session, "load_base", run_out)
    found = Heard().run([make_row("a"), make_row("b")])
    assert [(row.status, row.reason) for row in found.rows] == [("out_of_memory", "out of memory: full")] * 2
    assert found.exit_code == ExitCode.DOES_NOT_FIT


def test_memory_that_can_not_be_freed_is_a_remark_on_the_rows_after(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = MemoryMeter.reset
    calls: list[int] = []

    def refuse_once(self):
        reset(self)
        calls.append(1)
        if len(calls) == 3:  # after the first row has run
            raise RuntimeError("not freed")

    monkeypatch.setattr(MemoryMeter, "reset", refuse_once)
    first, second = Heard().run([make_row("a"), make_row("b")]).rows
    assert (first.status, second.status) == ("done", "done")
    assert first.notices == ()
    assert second.notices == ("Memory of an earlier row may still count here: failed: RuntimeError: not freed",)


def test_what_is_found_is_told_after_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    train = measure.measure_training
    ran: list[str] = []

    def stop_at_second(base, setup, num_steps, clock):
        ran.append(setup.row.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return train(base, setup, num_steps, clock)

    monkeypatch.setattr(session, "measure_training", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        heard.run([make_row("a"), make_row("b")])
    assert [row.name for row in heard.results[-1].rows] == ["a"]
    assert heard.results[-1].num_rows == 2


def test_real_samples_give_the_time_of_an_epoch_and_padding() -> None:
    row = make_row(
        max_length=256, per_device_train_batch_size=4, dataset="builtin:tiny/tasks-train.jsonl", max_samples=10
    )
    [found] = Heard().run([row]).rows
    assert found.speed is not None and found.epoch_s is not None
    assert found.epoch_s == pytest.approx(3 * found.speed.step_s.median)  # 10 samples, 4 in a step
    assert any(step.num_padded_tokens > step.num_tokens for step in found.speed.steps)
    assert found.data is not None and "10 samples" in found.data
    [random] = Heard().run([row], replace(QUICK, use_random=True)).rows
    assert random.epoch_s is None
    assert random.data is not None and "random tokens" in random.data


@pytest.fixture(scope="module")
def base() -> object:
    return session.load_base(make_setup())


def make_clock() -> measure.StepClock:
    return measure.StepClock(False, 1, MemoryMeter(is_gpu=False, reader=None), lambda step: None)


def test_a_row_leaves_the_base_model_and_the_disk_as_they_were(
    base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    held: list[weakref.ref] = []
    train = measure._TimedTrainer.train

    def keep(self, *args, **kwargs):
        trained = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        held.extend([weakref.ref(self), weakref.ref(trained)])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(measure._TimedTrainer, "train", keep)
    measured = measure.measure_training(base, make_setup(), 2, make_clock())
    assert len(measured.steps) == 2
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert {name: parameter.data_ptr() for name, parameter in base.named_parameters()} == before
    assert not measure.has_lora(base)
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_the_plan_of_the_row_is_the_one_that_runs(base, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make_setup(per_device_train_batch_size=4)
    plan = ExecutionPlan(
        micro_batch_size=1,
        micro_batch_tokens=48,
        splits_by_tokens=True,
        num_recomputed=3,
        pages_optimizer=False,
        validation_tokens=48,
    )
    recomputing: list[int] = []
    train = measure._TimedTrainer.train

    def look(self, *args, **kwargs):
        recomputing.append(sum(getattr(module, "recomputes", False) for module in self.model.modules()))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(measure._TimedTrainer, "train", look)
    planned = replace(setup, run_plan=replace(setup.run_plan, plan=plan))
    measured = measure.measure_training(base, planned, 1, make_clock())
    assert recomputing == [3]
    assert measured.steps[0].num_micro_batches == 2  # 4 x 24 tokens, 48 at a time


def test_the_profiler_records_the_step_after_the_warm_up(base, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the profiler's CPU activity in the place of the GPU's, which this test does not need to have."""
    monkeypatch.setattr(measure, "_PROFILED", torch.profiler.ProfilerActivity.CPU)
    begun: list[int] = []
    meter = MemoryMeter(is_gpu=False, reader=None)
    spans, step = measure.record_kernels(base, make_setup(), 1, meter, begun.append)
    assert begun == [1, 2]
    assert step.num_tokens == 48
    products = [span for span in spans if span.name in ("aten::mm", "aten::addmm")]
    assert products
    assert all(span.end_ns >= span.start_ns > 0 for span in spans)


def test_a_profiled_step_that_fails_leaves_the_profiler_free(base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_PROFILED", torch.profiler.ProfilerActivity.CPU)
    meter = MemoryMeter(is_gpu=False, reader=None)
    step = measure._TimedTrainer.training_step

    def fail(self, *args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(measure._TimedTrainer, "training_step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        measure.record_kernels(base, make_setup(), 0, meter, lambda step: None)
    monkeypatch.setattr(measure._TimedTrainer, "training_step", step)
    assert measure.record_kernels(base, make_setup(), 0, meter, lambda step: None)[0]
