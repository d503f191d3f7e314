"""`dsft monitor --wait-free`: one line on a terminal says how far it is, stdout gets the UUID of the GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsft.cli.events import make_record
from dsft.cli.output import Mode, Output
from dsft.core.units import format_duration, format_gib
from dsft.monitor.config import MonitorConfig
from dsft.monitor.nvml.gpus import GpuReading, NvmlGpus
from dsft.monitor.sample import GpuSample, Problem
from dsft.monitor.sampler import ReadsGpus
from dsft.monitor.wait_free import MemoryFree, wait_free


def wait(config: MonitorConfig, output: Output, needed_bytes: int) -> None:
    """Wait until a GPU has so much memory free, and name it.

    Raises:
        DsftError: It can't have, or not in time.
    """

    def tell_lost(problem: Problem) -> None:
        output.warn(f"{problem.found} It is waited for too: {problem.fix}")

    looks = _Looks(NvmlGpus(config.gpus))
    with _open_status(output, needed_bytes) as on_wait:
        found = wait_free(config, needed_bytes, looks, on_wait, on_lost=tell_lost)
    output.emit(make_record(found))
    output.write(found.uuid or str(found.gpu_index))
    output.note(
        f"{looks.name(found)} has {format_gib(found.memory_free_bytes)} free"
        f"{f' after {format_duration(found.waited_s)}' if found.waited_s >= 1 else ''}."
    )


class _Looks:
    """Looks at the GPUs, and remembers the last one, to call what was found by its name.

    Args:
        gpus: Reads them.
    """

    def __init__(self, gpus: ReadsGpus) -> None:
        self._reader = gpus
        self._seen: tuple[GpuSample, ...] = ()

    def read(self, num_pcie_measurements: int) -> GpuReading:
        """Return what the driver says now."""
        reading = self._reader.read(num_pcie_measurements)
        self._seen = reading.gpus
        return reading

    def name(self, found: MemoryFree) -> str:
        """Return `GPU 0`, or `GPU 0 MIG 2` for a MIG instance."""
        for gpu in self._seen:
            for mig in gpu.migs if gpu.is_mig_enabled and gpu.index == found.gpu_index else ():
                if (mig.uuid, mig.memory_free_bytes) == (found.uuid, found.memory_free_bytes):
                    return f"GPU {gpu.index} MIG {mig.index}"
        return f"GPU {found.gpu_index}"


@contextmanager
def _open_status(output: Output, needed_bytes: int) -> Iterator[Callable[[int], None]]:
    """Give what is free a line of its own on a terminal, one message elsewhere."""
    needed = format_gib(needed_bytes)
    if output.mode is Mode.HUMAN and output.stderr.is_terminal:
        with output.stderr.status(f"Waiting for {needed} …", spinner="line", refresh_per_second=4) as status:
            yield lambda free_bytes: status.update(f"Waiting for {needed}; {format_gib(free_bytes)} free")
        return
    is_told = False

    def tell_once(free_bytes: int) -> None:
        nonlocal is_told
        if not is_told:
            output.note(f"Waiting for {needed}; {format_gib(free_bytes)} free.")
            is_told = True

    yield tell_once
