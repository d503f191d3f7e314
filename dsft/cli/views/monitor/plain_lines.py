"""A sample as plain lines, for files and pipes, and an alert as a sentence."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from dsft.cli.views.monitor.figures import format_figure, format_memory, format_share
from dsft.cli.views.monitor.run_words import describe_outcome, describe_stage, name_runs
from dsft.core.units import GIB, format_count, format_duration, format_gib
from dsft.monitor.sample import AlertSample, GpuSample, HostSample, MigSample, Problem, RunSample, Sample
from dsft.monitor.throttle import explain_reasons


def format_sample(
    sample: Sample, ends_told: set[str] | None = None, problems_told: dict[int | None, Problem] | None = None
) -> Iterator[str]:
    """Return a line for each GPU, MIG instance, run and the host; each begins with the time of day here.

    Args:
        sample: What is told.
        ends_told: Runs whose end was told before, which is told once; those of this sample are added.
        problems_told: Why GPUs, by their index, or all of them (None) can't be read, as was told before; told again
            only when it changes, and brought up to date.
    """
    clock = format_clock(sample.time)
    yield from (f"{clock} {line}" for line in _format_problems(sample, {} if problems_told is None else problems_told))
    for gpu in sample.gpus:
        if gpu.problem is not None:
            continue
        yield f"{clock} GPU {gpu.index}: {' · '.join(_gpu_parts(gpu))}"
        for mig in gpu.migs:
            yield f"{clock} GPU {gpu.index} MIG {mig.index}: {' · '.join(_memory_and_processes(mig))}"
    yield from (f"{clock} run {line}" for line in _format_runs(sample.runs, set() if ends_told is None else ends_told))
    if sample.host is not None:
        yield f"{clock} host: {' · '.join(_host_parts(sample.host))}"


def format_clock(time: str) -> str:
    """Return the time of day here of a sample's time."""
    return f"{datetime.fromisoformat(time).astimezone():%H:%M:%S}"


def name_place(alert: AlertSample) -> str:
    """Return what an alert is about: `host`, `GPU 0` or `GPU 0 MIG 2`."""
    if alert.gpu_index is None:
        return "host"
    return f"GPU {alert.gpu_index}" + (f" MIG {alert.mig_index}" if alert.mig_index is not None else "")


def describe_alert(alert: AlertSample) -> str:
    """Return what an alert says, e.g. `GPU 0: vram is 97.2 % (alert vram>95)`."""
    place = name_place(alert)
    if alert.value is None:
        return f"{place}: {alert.metric} is not told, so the alert {alert.alert} can't be judged"
    value = f"{alert.value:.2f}".rstrip("0").rstrip(".")
    return f"{place}: {alert.metric} is {value} {alert.unit} (alert {alert.alert})"


def _format_problems(sample: Sample, told: dict[int | None, Problem]) -> Iterator[str]:
    now: dict[int | None, Problem | None] = {gpu.index: gpu.problem for gpu in sample.gpus}
    now[None] = sample.problem
    for index, problem in now.items():
        if problem is not None and told.get(index) != problem:
            told[index] = problem
            yield problem.found if index is None else f"GPU {index}: {problem.found}"
        elif problem is None and told.pop(index, None) is not None:
            yield "GPUs can be read again" if index is None else f"GPU {index} can be read again"


def _gpu_parts(gpu: GpuSample) -> Iterator[str]:
    memory, *processes = _memory_and_processes(gpu)
    yield memory
    yield f"util {format_figure(gpu.gpu_utilization_percent, '%')}"
    yield f"bandwidth {format_figure(gpu.memory_bandwidth_utilization_percent, '%')}"
    yield f"temp {format_figure(gpu.temperature_c, '°C')}"
    yield f"power {format_share(gpu.power_w, gpu.power_limit_w, 'W')}"
    yield f"SM {format_figure(gpu.sm_clock_mhz, 'MHz')}"
    if gpu.throttle_reasons:
        yield ", ".join(reason.words for reason in explain_reasons(gpu.throttle_reasons))
    yield from processes


def _memory_and_processes(device: GpuSample | MigSample) -> Iterator[str]:
    yield f"memory {format_memory(device.memory_used_bytes, device.memory_total_bytes)}"
    if device.processes is not None:
        num_processes = len(device.processes)
        yield f"{num_processes} {'process' if num_processes == 1 else 'processes'}"


def _format_runs(runs: Sequence[RunSample], ends_told: set[str]) -> Iterator[str]:
    for run, (name, folder) in zip(runs, name_runs(runs), strict=True):
        if run.outcome is not None:
            key = f"{run.started} {run.event_log}"
            if key in ends_told:
                continue
            ends_told.add(key)
        yield f"{name}{f' ({folder})' if folder else ''}: {' · '.join(_run_parts(run))}"


def _run_parts(run: RunSample) -> Iterator[str]:
    yield describe_stage(run) if run.outcome is None else describe_outcome(run)
    if run.step is not None:
        yield f"step {run.step}{f'/{run.num_steps}' if run.num_steps is not None else ''}"
    if run.loss is not None:
        yield f"loss {run.loss:.4f}"
    if run.tok_per_s is not None:
        yield f"{format_count(run.tok_per_s)} tok/s"
    if run.eta_s is not None:
        yield f"{format_duration(run.eta_s)} left"
    if run.outcome is None and run.peak_memory_bytes is not None:
        predicted = run.predicted_memory_bytes
        of_predicted = f" of {format_gib(predicted)} predicted" if predicted is not None else " GiB"
        yield f"peak {run.peak_memory_bytes / GIB:.1f}{of_predicted}"


def _host_parts(host: HostSample) -> Iterator[str]:
    yield f"CPU {format_figure(host.cpu_percent, '%')}"
    yield f"RAM {format_memory(host.memory_used_bytes, host.memory_total_bytes)}"
    yield f"swap {format_memory(host.swap_used_bytes, host.swap_total_bytes)}"
    yield f"disk {format_memory(host.disk_used_bytes, host.disk_total_bytes)}"
