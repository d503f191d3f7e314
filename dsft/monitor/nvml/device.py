"""One GPU: its handle, what never changes, and what it says now."""

from dataclasses import asdict, fields, replace
from time import monotonic
from typing import Any

from dsft.monitor.nvml.codes import NVML_LOST
from dsft.monitor.nvml.facts import GpuFacts, read_facts
from dsft.monitor.nvml.mig import MigReader
from dsft.monitor.nvml.problems import describe_device_problem
from dsft.monitor.nvml.process_lists import ProcessLister
from dsft.monitor.nvml.questions import Questions
from dsft.monitor.nvml.values import read_values
from dsft.monitor.processes import ProcessReader
from dsft.monitor.sample import GpuSample, Problem

RETRY_S = 5.0
"""How long something that is lost is left alone."""

_MIG_MODE_S = 5.0
_SAMPLE_FIELDS = frozenset(field.name for field in fields(GpuSample))


class GpuDevice:
    """Reads one GPU, and tries again later where it is lost.

    Args:
        nvml: The pynvml module, initialised.
        index: Which GPU it is called in samples.
        processes: Tells what the PIDs are.

    Attributes:
        index: As given.
        nvml_index: Which one it is for NVML now; None where NVML counts it no more.
        problem: Why it can't be read.
    """

    def __init__(self, nvml: Any, index: int, processes: ProcessReader) -> None:
        self.index = index
        self.nvml_index: int | None = index
        self.problem: Problem | None = None
        self._nvml = nvml
        self._processes = processes
        self._retry_at_s = 0.0
        self._questions: Questions | None = None
        self._facts = GpuFacts()
        self._values_of_facts: dict[str, Any] = {}
        self._mig: MigReader | None = None
        self._watched_parts: frozenset[str] | None = None
        self._mig_mode_at_s = 0.0
        self._lister: ProcessLister | None = None
        self._is_utilization_due = True
        self._pcie_bytes_per_s: dict[str, float] = {}

    def open(self) -> None:
        """Get a handle and read what never changes, if that is not done and it is time to try.

        Raises:
            NVMLError: NVML as a whole is lost.
        """
        try:
            if self._questions is not None and self._is_mig_mode_kept(self._questions):
                return
            if monotonic() < self._retry_at_s:
                return
            if self.nvml_index is None:
                raise self._nvml.NVMLError(self._nvml.NVML_ERROR_GPU_NOT_FOUND)
            questions = Questions(self._nvml, self._nvml.nvmlDeviceGetHandleByIndex(self.nvml_index))
            facts = read_facts(questions)
        except self._nvml.NVMLError as error:
            self._lose(error)
            return
        self._questions = questions
        known = self._facts
        self._facts = replace(
            facts,
            uuid=facts.uuid or known.uuid,
            name=facts.name or known.name,
            pci_bus_id=facts.pci_bus_id or known.pci_bus_id,
        )
        self._values_of_facts = {name: value for name, value in asdict(self._facts).items() if name in _SAMPLE_FIELDS}
        self._mig = MigReader(questions, self._processes) if self._facts.is_mig_enabled else None
        self._mig_mode_at_s = monotonic()
        self._lister = ProcessLister(questions, self._processes)
        self._is_utilization_due = True
        self._pcie_bytes_per_s = {}

    def close(self) -> None:
        """Forget the handle: NVML is shut down, or counts its devices anew."""
        self._questions = None
        self._retry_at_s = 0.0

    @property
    def uuid(self) -> str | None:
        """Its UUID, None until it could be read."""
        return self._facts.uuid

    def find_parts(self) -> tuple[str, ...]:
        """Return the UUIDs of its MIG instances.

        Raises:
            NVMLError: NVML as a whole is lost.
        """
        if self._questions is None or self._mig is None:
            return ()
        try:
            return self._mig.find_uuids()
        except self._nvml.NVMLError as error:
            self._lose(error)
            return ()

    def watch_parts(self, uuids: frozenset[str] | None) -> None:
        """Tell of its MIG instances these alone, or all of them."""
        self._watched_parts = uuids

    @property
    def pcie_directions(self) -> tuple[str, ...]:
        """Directions in which its PCIe traffic can be measured: `rx`, `tx` or none."""
        if self._questions is None:
            return ()
        return tuple(name for name, counter in self._pcie_counters() if not self._questions.is_unanswerable(*counter))

    def measure_pcie(self, direction: str) -> None:
        """Measure a direction for 20 ms; the next samples tell the result.

        Raises:
            NVMLError: NVML as a whole is lost.
        """
        if self._questions is None:
            return
        try:
            kb_per_s = self._questions.ask_number(*dict(self._pcie_counters())[direction])
        except self._nvml.NVMLError as error:
            self._lose(error)
            return
        if kb_per_s is not None:
            self._pcie_bytes_per_s[direction] = kb_per_s * 1000.0
        else:
            self._pcie_bytes_per_s.pop(direction, None)

    def read(self, *, reads_process_utilization: bool) -> GpuSample:
        """Return what the GPU says now.

        Args:
            reads_process_utilization: Whether that is asked for anew; after `open` it is anyway.

        Raises:
            NVMLError: NVML as a whole is lost.
        """
        if self._questions is not None:
            try:
                return self._read(self._questions, reads_process_utilization)
            except self._nvml.NVMLError as error:
                self._lose(error)
        return GpuSample(self.index, self.uuid, self._facts.name, self.problem)

    def _read(self, questions: Questions, reads_process_utilization: bool) -> GpuSample:
        questions.num_answers, questions.failure = 0, None
        mig = self._mig
        values = read_values(questions, self._facts)
        if not questions.num_answers and questions.failure is not None:
            raise questions.failure  # it answers nothing at all
        processes = None
        if mig is None and self._lister is not None:
            processes = self._lister.read(reads_utilization=reads_process_utilization or self._is_utilization_due)
            self._is_utilization_due = False
        self.problem = None
        return GpuSample(
            index=self.index,
            pcie_rx_bytes_per_s=self._pcie_bytes_per_s.get("rx"),
            pcie_tx_bytes_per_s=self._pcie_bytes_per_s.get("tx"),
            migs=mig.read(self._watched_parts) if mig is not None else (),
            processes=processes,
            **self._values_of_facts,
            **values,
        )

    def _is_mig_mode_kept(self, questions: Questions) -> bool:
        """Return whether MIG is as it was; a GPU where it was turned on or off tells other counters."""
        if self._facts.is_mig_enabled is None or monotonic() < self._mig_mode_at_s + _MIG_MODE_S:
            return True
        self._mig_mode_at_s = monotonic()
        mode = questions.ask("nvmlDeviceGetMigMode")
        return mode is None or bool(mode[0]) == self._facts.is_mig_enabled

    def _lose(self, error: Any) -> None:
        if error.value in NVML_LOST:
            raise error
        self.problem = describe_device_problem(
            error, self.index, self._facts.name, self._facts.uuid or self._facts.pci_bus_id
        )
        self._questions = None
        self._retry_at_s = monotonic() + RETRY_S

    def _pcie_counters(self) -> tuple[tuple[str, tuple[str, int]], ...]:
        function = "nvmlDeviceGetPcieThroughput"
        return (
            ("rx", (function, self._nvml.NVML_PCIE_UTIL_RX_BYTES)),
            ("tx", (function, self._nvml.NVML_PCIE_UTIL_TX_BYTES)),
        )
