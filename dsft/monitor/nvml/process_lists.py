"""The processes that use a GPU (or a MIG instance), as the driver lists them, with what the system knows of them."""

from collections.abc import Iterable
from time import time
from typing import Any

from dsft.monitor.nvml.codes import NvmlCode
from dsft.monitor.nvml.questions import Questions
from dsft.monitor.processes import ProcessReader
from dsft.monitor.sample import ProcessSample

_LISTS = (
    ("compute", "nvmlDeviceGetComputeRunningProcesses"),
    ("compute", "nvmlDeviceGetMPSComputeRunningProcesses"),
    ("graphics", "nvmlDeviceGetGraphicsRunningProcesses"),
)

_NOT_AVAILABLE = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE of its 64-bit values."""

_FIRST_PERIOD_S = 2.0
_ALL = 100


class ProcessLister:
    """Lists the processes of one handle.

    Args:
        questions: To the device.
        processes: Tells what the PIDs are.
    """

    def __init__(self, questions: Questions, processes: ProcessReader) -> None:
        self._questions = questions
        self._processes = processes
        self._utilization: dict[int, float | None] = {}
        self._utilization_since_us = 0

    def read(self, *, reads_utilization: bool) -> tuple[ProcessSample, ...] | None:
        """Return the processes, most memory first; None where the driver does not tell them.

        Args:
            reads_utilization: Whether their utilisation is asked for anew.

        Raises:
            NVMLError: The device or NVML as a whole is lost.
        """
        listed = [(kind, self._questions.ask(function)) for kind, function in _LISTS]
        if all(infos is None for _, infos in listed):
            return None
        kinds: dict[int, set[str]] = {}
        memory: dict[int, int | None] = {}
        for kind, infos in listed:
            for info in infos or ():
                pid, used = int(info.pid), _bytes_or_none(info.usedGpuMemory)
                kinds.setdefault(pid, set()).add(kind)
                known = memory.get(pid)
                memory[pid] = max(used, known or 0) if used is not None else known  # both lists tell all of it
        if reads_utilization and kinds:
            self._read_utilization(kinds.keys())
        samples = [self._describe(pid, kinds[pid], memory[pid]) for pid in kinds]
        return tuple(sorted(samples, key=lambda sample: (-(sample.memory_used_bytes or 0), sample.pid)))

    def _describe(self, pid: int, kinds: set[str], memory_bytes: int | None) -> ProcessSample:
        facts = self._processes.read(pid)
        return ProcessSample(
            pid=pid,
            kind="+".join(sorted(kinds)),
            memory_used_bytes=memory_bytes,
            sm_utilization_percent=self._utilization.get(pid),
            user=facts.user,
            command=facts.command,
            is_visible=facts.is_visible,
            container_pid=facts.container_pid,
            container_id=facts.container_id,
        )

    def _read_utilization(self, pids: Iterable[int]) -> None:
        """Ask which processes had kernels running since the last time; of those listed now, the others had none."""
        since_us = self._utilization_since_us or int((time() - _FIRST_PERIOD_S) * 1e6)
        questions = self._questions
        questions.failure = None
        samples = questions.ask("nvmlDeviceGetProcessUtilization", since_us)
        if samples is None:
            is_idle = questions.failure is not None and questions.failure.value == NvmlCode.NOT_FOUND
            self._utilization = dict.fromkeys(pids, 0.0) if is_idle else {}
            return
        self._utilization = dict.fromkeys(pids, 0.0)
        for sample in sorted(samples, key=lambda sample: int(sample.timeStamp)):  # the newest counts
            # Drivers are known to tell figures without sense now and then.
            self._utilization[int(sample.pid)] = float(sample.smUtil) if sample.smUtil <= _ALL else None
        self._utilization_since_us = max((int(sample.timeStamp) for sample in samples), default=since_us)


def _bytes_or_none(num_bytes: Any) -> int | None:
    return None if num_bytes is None or int(num_bytes) == _NOT_AVAILABLE else int(num_bytes)
