"""`dsft bench`: measure the speed and memory of configurations, one after the other, without loading a model twice."""

from collections.abc import Sequence

from dsft.bench.options import BenchOptions, BenchSink, Progress
from dsft.bench.result import BenchResult
from dsft.bench.rows import BenchRow
from dsft.core.models.device import choose_allocator, hide_gpus
from dsft.core.signals import held_signals


def run_bench(rows: Sequence[BenchRow], options: BenchOptions, sink: BenchSink) -> BenchResult:
    """Measure configurations; one that fails or does not fit is a row that says so.

    Rows of the same model run one after the other on one loaded copy of it. First all rows run through dsft, then GPU
    kernels are recorded, and at the end the plain path runs, which needs a model of its own; both where asked for.

    Args:
        rows: What to measure.
        options: How.
        sink: Whom to tell.

    Returns:
        Everything that was found, rows in the order they were given.
    """
    choose_allocator()
    sink.on_progress(Progress(0, len(rows), "", "load PyTorch"))
    with held_signals():  # imports are not to be interrupted
        from dsft.bench.session import Session
    if all(row.config.device == "cpu" for row in rows):
        hide_gpus()
    session = Session(rows, options, sink)
    session.run()
    return session.result


def find_gpu() -> bool:
    """Return whether there is a GPU to measure on."""
    choose_allocator()
    with held_signals():
        import torch

    return torch.cuda.is_available()
