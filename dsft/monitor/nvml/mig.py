"""The MIG instances of a GPU: parts that programs see as devices of their own."""

from time import monotonic
from typing import Any

from dsft.monitor.nvml.codes import NVML_LOST
from dsft.monitor.nvml.process_lists import ProcessLister
from dsft.monitor.nvml.questions import Questions
from dsft.monitor.nvml.values import read_memory
from dsft.monitor.processes import ProcessReader
from dsft.monitor.sample import MigSample

_SEARCH_S = 5.0
"""How often instances that came or went are looked for."""


class _Instance:
    """One instance and what never changes about it.

    Attributes:
        uuid: None where it is not told.
    """

    def __init__(self, index: int, questions: Questions, processes: ProcessReader) -> None:
        self._index = index
        self._questions = questions
        self.uuid = questions.ask_text("nvmlDeviceGetUUID")
        self._name = questions.ask_text("nvmlDeviceGetName")
        self._lister = ProcessLister(questions, processes)

    def read(self) -> MigSample:
        """Return what the instance says now."""
        return MigSample(
            index=self._index,
            uuid=self.uuid,
            name=self._name,
            processes=self._lister.read(reads_utilization=False),
            **read_memory(self._questions),
        )


class MigReader:
    """Reads the instances of one GPU that has MIG on.

    Args:
        questions: To the GPU.
        processes: Tells what the PIDs are.
    """

    def __init__(self, questions: Questions, processes: ProcessReader) -> None:
        self._questions = questions
        self._processes = processes
        self._instances: tuple[_Instance, ...] = ()
        self._search_at_s = 0.0

    def read(self, watched: frozenset[str] | None) -> tuple[MigSample, ...]:
        """Return what the instances say now, by index.

        Args:
            watched: UUIDs of those that are asked; None for all.

        Raises:
            NVMLError: The GPU or NVML as a whole is lost.
        """
        if monotonic() >= self._search_at_s:
            self._instances = self._search()
            self._search_at_s = monotonic() + _SEARCH_S
        samples = []
        for instance in self._instances:
            if watched is not None and instance.uuid not in watched:
                continue
            try:
                samples.append(instance.read())
            except self._questions.nvml.NVMLError as error:
                if error.value in NVML_LOST:
                    raise
                self._search_at_s = 0.0  # it was destroyed
        return tuple(samples)

    def find_uuids(self) -> tuple[str, ...]:
        """Return the UUIDs of the instances there are.

        Raises:
            NVMLError: The GPU or NVML as a whole is lost.
        """
        return tuple(instance.uuid for instance in self._search() if instance.uuid is not None)

    def _search(self) -> tuple[_Instance, ...]:
        nvml, count = self._questions.nvml, self._questions.ask_number("nvmlDeviceGetMaxMigDeviceCount")
        found = []
        for index in range(count or 0):
            handle = self._find(index)
            if handle is not None:
                found.append(_Instance(index, Questions(nvml, handle), self._processes))
        return tuple(found)

    def _find(self, index: int) -> Any:
        nvml = self._questions.nvml
        try:
            return nvml.nvmlDeviceGetMigDeviceHandleByIndex(self._questions.handle, index)
        except nvml.NVMLError as error:
            if error.value in NVML_LOST:
                raise
            return None  # that many are possible, but not made
