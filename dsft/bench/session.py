"""One bench at work: models loaded and let go, rows measured on them, and what was found so far."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dsft.bench.attempt import Failure, attempt
from dsft.bench.ceiling import measure_ceiling
from dsft.bench.figures import MemoryFigures, compare_memory, count_useful_flops_per_s, measure_speed
from dsft.bench.kernels import share_step_time, share_wall_clock
from dsft.bench.measure import Measurement, StepClock, has_lora, measure_training, record_kernels
from dsft.bench.memory import MemoryMeter
from dsft.bench.options import BenchOptions, BenchSink, Progress
from dsft.bench.plain import load_plain, measure_plain
from dsft.bench.result import BaselineResult, BenchResult, DeviceFigures, RowResult, TimeShares, summarize_sets
from dsft.bench.rows import BenchRow
from dsft.bench.setup import RowSetup, prepare_row
from dsft.core.errors import ExitCode
from dsft.core.memory.model_shape import ModelShape
from dsft.core.models.device import resolve_device, torch_dtype
from dsft.core.models.load import load_quantized
from dsft.core.versions import versions
from dsft.train.planning import look_at_card
from dsft.train.setup import describe_blocks

NUM_STEPS_BEFORE_PROFILE = 1


class Session:
    """Measures rows.

    Args:
        rows: What to measure.
        options: How.
        sink: Whom to tell.
    """

    def __init__(self, rows: Sequence[BenchRow], options: BenchOptions, sink: BenchSink) -> None:
        self._rows = rows
        self._options = options
        self._sink = sink
        self._found: list[RowResult | None] = [None] * len(rows)
        self._setups: dict[int, RowSetup] = {}
        self._ceilings: dict[tuple[ModelShape, int, str], float | Failure] = {}
        device = resolve_device("cpu" if all(row.config.device == "cpu" for row in rows) else "auto")
        self._view = look_at_card(device)
        reader = self._view.reader if self._view is not None else None
        self._meter = MemoryMeter(is_gpu=device.kind == "cuda", reader=reader)
        used_bytes = self._view.card.driver_bytes if self._view is not None and reader is not None else None
        self._device = DeviceFigures(device.name, device.total_bytes, used_bytes)
        self._versions = versions()
        self._remarks: tuple[str, ...] = ()

    @property
    def result(self) -> BenchResult:
        """What was found so far."""
        rows = tuple(row for row in self._found if row is not None)
        return BenchResult(
            device=self._device,
            versions=self._versions,
            num_steps=self._options.num_steps,
            num_warmup_steps=self._options.num_warmup_steps,
            rows=rows,
            num_rows=len(self._rows),
            sets=summarize_sets(rows),
        )

    def run(self) -> None:
        """Measure all rows."""
        for index in range(len(self._rows)):
            self._prepare(index)
        for group in self._groups():
            self._measure_group(group)
        if self._options.has_baseline:
            for group in self._groups():
                self._measure_baselines(group)

    # Before a model is loaded

    def _prepare(self, index: int) -> None:
        row, options = self._rows[index], self._options
        self._tell(index, "prepare")
        outcome = attempt(
            lambda: prepare_row(
                row,
                self._view,
                options.num_warmup_steps + options.num_steps,
                use_random=options.use_random,
                on_rows=lambda num_rows: self._tell(index, f"tokenize, {num_rows:,} rows"),
            )
        )
        if isinstance(outcome, Failure):
            self._fail(index, outcome)
        else:
            self._setups[index] = outcome

    def _groups(self) -> list[list[int]]:
        """Return the rows that can run, those of a model together, in the order in which each model comes first."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, setup in self._setups.items():
            groups.setdefault(setup.model_key, []).append(index)
        return list(groups.values())

    # dsft itself

    def _measure_group(self, group: list[int]) -> None:
        base = self._load(group[0], load_base)
        for index in group:
            if isinstance(base, Failure):
                self._fail(index, base)
                continue
            self._measure(index, base)
            base = self._clean(index, base, load_base)
        if self._options.is_profiled and not isinstance(base, Failure):
            for index in group:
                if not isinstance(base, Failure):
                    self._profile(index, base)
                    base = self._clean(index, base, load_base)
        del base
        self._reset()

    def _load(self, index: int, load: Callable[[RowSetup], Any]) -> Any:
        self._reset()
        self._tell(index, "load and quantize the model")
        return attempt(lambda: load(self._setups[index]))

    def _clean(self, index: int, base: Any, load: Callable[[RowSetup], Any]) -> Any:
        """Return the base model, loaded anew where running out of memory has left half of LoRA attached to it."""
        if isinstance(base, Failure) or not has_lora(base):
            return base
        del base
        return self._load(index, load)

    def _measure(self, index: int, base: Any) -> None:
        setup, options = self._setups[index], self._options
        self._reset()
        begun = self._begin(index)
        clock = self._make_clock(index, "measure", options.num_steps)
        self._tell(index, "attach LoRA")
        outcome = attempt(lambda: measure_training(base, setup, options.num_steps, clock))
        self._reset()
        if isinstance(outcome, Failure):
            self._fail(index, outcome, clock.step)
            return
        self._add(index, self._describe(index, begun, outcome))
        self._sink.on_row(self._get(index))

    def _describe(self, index: int, begun: RowResult, measurement: Measurement) -> RowResult:
        setup = self._setups[index]
        speed = measure_speed(measurement.steps)
        predicted = _predict(setup)
        measured = measurement.memory if setup.is_gpu else None
        useful = count_useful_flops_per_s(setup.shape, measurement.steps)
        found = self._find_ceiling(index)
        ceiling = None if isinstance(found, Failure) else found
        num_epoch_steps = math.ceil(len(setup.data.sequences) / setup.config.effective_batch_size)
        time = None
        if self._options.is_profiled and not setup.is_gpu:
            time = TimeShares(share_wall_clock(measurement.phase_s), "wall clock")
        notices = begun.notices
        if isinstance(found, Failure):
            notices = (*notices, f"The ceiling was not measured: {found.tell()}")
        return replace(
            begun,
            status="done",
            exit_code=ExitCode.DONE,
            speed=speed,
            predicted=predicted,
            measured=measured,
            error_percent=compare_memory(predicted, measured) if predicted is not None and measured is not None else {},
            host_bytes=measurement.host_bytes,
            epoch_s=None if setup.data.is_random else num_epoch_steps * speed.step_s.median,
            ceiling_flops=ceiling,
            useful_flops=useful,
            ceiling_share=useful / ceiling if ceiling else None,
            time=time,
            notices=notices,
        )

    def _find_ceiling(self, index: int) -> float | Failure | None:
        setup, seconds = self._setups[index], self._options.ceiling_s
        if seconds <= 0:
            return None
        num_tokens, _ = count_largest_micro_batch(setup)
        key = (setup.shape, num_tokens, setup.precision)
        if key not in self._ceilings:
            self._tell(index, "matrix products alone")
            dtype = torch_dtype(setup.precision)
            self._ceilings[key] = attempt(
                lambda: measure_ceiling(setup.shape, num_tokens, dtype, setup.torch_device, seconds)
            )
            self._reset()
        return self._ceilings[key]

    def _profile(self, index: int, base: Any) -> None:
        setup, row = self._setups[index], self._found[index]
        if not setup.is_gpu or row is None or row.speed is None:
            return
        tok_per_s = row.speed.tok_per_s
        outcome = attempt(
            lambda: record_kernels(
                base,
                setup,
                NUM_STEPS_BEFORE_PROFILE,
                self._meter,
                lambda step: self._tell(index, "record kernels", step, NUM_STEPS_BEFORE_PROFILE + 1),
            )
        )
        self._reset()
        if isinstance(outcome, Failure):
            self._note(index, f"Where the time goes is not known: {outcome.tell()}")
            return
        spans, step = outcome
        if not spans:
            self._note(index, "Where the time goes is not known: the profiler saw no kernels.")
            return
        shares = share_step_time(spans, step.num_tokens / tok_per_s * 1e9)
        self._add(index, replace(row, time=TimeShares(shares, "kernels")))

    # The plain path

    def _measure_baselines(self, group: list[int]) -> None:
        done = [index for index in group if self._get(index).status == "done"]
        if not done:
            return
        base = self._load(done[0], load_plain)
        for index in done:
            baseline = self._measure_baseline(index, base)
            self._add(index, replace(self._get(index), baseline=baseline))
            base = self._clean(index, base, load_plain)
        del base
        self._reset()

    def _measure_baseline(self, index: int, base: Any) -> BaselineResult:
        if isinstance(base, Failure):
            return BaselineResult(base.status, base.tell())
        setup, options = self._setups[index], self._options
        self._reset()
        clock = self._make_clock(index, "plain path", options.num_steps)
        outcome = attempt(lambda: measure_plain(base, setup, options.num_steps, clock))
        memory = self._meter.peak() if setup.is_gpu else None
        self._reset()
        if isinstance(outcome, Failure):
            return BaselineResult(outcome.status, outcome.tell(clock.step))
        speed, own = measure_speed(outcome), self._get(index).speed
        speedup = own.tok_per_s / speed.tok_per_s if own is not None else None
        return BaselineResult("done", speed=speed, measured=memory, speedup=speedup)

    # What is told and kept

    def _reset(self) -> None:
        """Empty the memory; that something could not be freed belongs into every row measured after it."""
        outcome = attempt(self._meter.reset)
        if isinstance(outcome, Failure):
            self._remarks = (*self._remarks, f"Memory of an earlier row may still count here: {outcome.tell()}")

    def _make_clock(self, index: int, phase: str, num_steps: int) -> StepClock:
        num_all = self._options.num_warmup_steps + num_steps
        return StepClock(
            is_gpu=self._setups[index].is_gpu,
            num_warmup_steps=self._options.num_warmup_steps,
            meter=self._meter,
            on_begin=lambda step: self._tell(index, phase, step, num_all),
        )

    def _tell(self, index: int, phase: str, step: int = 0, num_steps: int = 0) -> None:
        self._sink.on_progress(Progress(index + 1, len(self._rows), self._rows[index].name, phase, step, num_steps))

    def _begin(self, index: int) -> RowResult:
        row, setup = self._rows[index], self._setups.get(index)
        config = row.config.model_dump()
        result = RowResult(row.name, config, "failed", ExitCode.FAILURE, set=row.set, notices=self._remarks)
        if setup is None:
            return result
        return replace(
            result,
            data=setup.data.description,
            precision=setup.precision,
            blocks=describe_blocks(setup.engine_obstacle),
            attention=setup.attention.description,
            plan=setup.plan_figures,
        )

    def _fail(self, index: int, failure: Failure, step: int | None = None) -> None:
        reason, code = failure.tell(step), failure.exit_code
        self._add(index, replace(self._begin(index), status=failure.status, reason=reason, exit_code=code))
        self._sink.on_row(self._get(index))

    def _note(self, index: int, notice: str) -> None:
        row = self._get(index)
        self._add(index, replace(row, notices=(*row.notices, notice)))

    def _add(self, index: int, row: RowResult) -> None:
        self._found[index] = row
        self._sink.on_result(self.result)

    def _get(self, index: int) -> RowResult:
        row = self._found[index]
        if row is None:
            raise LookupError(f"row {index} is not measured yet")
        return row


def load_base(setup: RowSetup) -> Any:
    """Load the base model that rows of a group share, as `dsft train` does."""
    return load_quantized(setup.source, setup.device, setup.precision, setup.attention)


def count_largest_micro_batch(setup: RowSetup) -> tuple[int, int]:
    """Return the tokens and the targets of the largest micro-batch of the whole run."""
    indices = setup.order.largest_micro_batch(setup.run_plan.plan)
    samples = [sample for index in indices for sample in setup.data.sequences[index]]
    return sum(len(sample.token_ids) for sample in samples), sum(int(sample.is_target[1:].sum()) for sample in samples)


def _predict(setup: RowSetup) -> MemoryFigures | None:
    num_tokens, num_targets = count_largest_micro_batch(setup)
    memory = setup.run_plan.predict(num_tokens, num_targets, setup.run_plan.plan)
    if memory is None:
        return None
    return MemoryFigures(memory.allocated_bytes, memory.reserved_bytes, memory.device_bytes)
