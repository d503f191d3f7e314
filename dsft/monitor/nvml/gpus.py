"""Reads GPUs through NVML; what the driver does not tell is None, what is broken is a sentence."""

from dataclasses import dataclass
from time import monotonic
from typing import Any

from dsft.core.errors import ConfigError
from dsft.monitor.nvml.codes import NVML_LOST
from dsft.monitor.nvml.device import RETRY_S, GpuDevice
from dsft.monitor.nvml.pcie import PcieMeter
from dsft.monitor.nvml.problems import describe_no_gpu, describe_nvml_problem, look_around
from dsft.monitor.nvml.selection import select_gpus
from dsft.monitor.processes import ProcessReader
from dsft.monitor.sample import DriverSample, GpuSample, Problem

_RECOUNT_S = 30.0
"""How often NVML is started anew while a GPU is lost: a GPU that was reset may need that, and it takes the driver some
10 ms."""

_PROCESS_UTILIZATION_S = 0.9
"""How often one GPU is asked how busy each process keeps it, which takes the driver 1.5 ms."""


@dataclass(frozen=True)
class GpuReading:
    """What NVML said.

    Attributes:
        problem: Why no GPU at all can be read.
        driver: The driver; None where NVML does not answer.
        gpus: The GPUs that are watched, by index.
    """

    problem: Problem | None
    driver: DriverSample | None
    gpus: tuple[GpuSample, ...]


class NvmlGpus:
    """Reads the GPUs that are watched. NVML is started at the first read, and again where it was lost.

    Args:
        selection: Indexes or UUIDs; empty for all.
        nvml: The module through which NVML is asked; None takes nvidia-ml-py's pynvml.
    """

    def __init__(self, selection: tuple[str, ...], nvml: Any = None) -> None:
        self._selection = selection
        self._nvml = nvml
        self._is_started = False
        self._started_at_s = 0.0
        self._retry_at_s = 0.0
        self._problem: Problem | None = None
        self._driver: DriverSample | None = None
        self._devices: list[GpuDevice] = []
        self._watched: list[GpuDevice] = []
        self._processes = ProcessReader()
        self._pcie = PcieMeter()
        self._utilization_turn = 0
        self._utilization_at_s = 0.0

    def read(self, num_pcie_measurements: int) -> GpuReading:
        """Return what the driver says now.

        Args:
            num_pcie_measurements: How many measurements of PCIe traffic, each of 20 ms, it may wait for.

        Raises:
            ConfigError: A GPU that was asked for is not there.
        """
        if self._nvml is None:
            import pynvml

            self._nvml = pynvml
        try:
            if self._is_time_to_start():
                self._start()
            if not self._is_started:
                return GpuReading(self._problem, self._driver, ())
            for device in self._watched:
                device.open()
            self._pcie.measure(self._watched, num_pcie_measurements)
            gpus = self._read_devices()
        except self._nvml.NVMLError as error:
            self._fail(describe_nvml_problem(self._nvml, error, look_around()))
            return GpuReading(self._problem, None, ())
        self._processes.forget_others()
        return GpuReading(None, self._driver, gpus)

    def close(self) -> None:
        """Let go of NVML."""
        if not self._is_started:
            return
        self._is_started = False
        for device in self._devices:
            device.close()
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            return  # it is gone by itself

    def _is_time_to_start(self) -> bool:
        if not self._is_started:
            return monotonic() >= self._retry_at_s
        is_any_lost = any(device.problem is not None for device in self._watched)
        return is_any_lost and monotonic() >= self._started_at_s + _RECOUNT_S

    def _start(self) -> None:
        self.close()
        self._driver = None
        self._nvml.nvmlInit()
        self._is_started = True
        self._started_at_s = monotonic()
        self._driver = self._read_driver()
        count = self._nvml.nvmlDeviceGetCount()
        if not count and not self._devices:
            self._fail(describe_no_gpu(look_around()))
            return
        self._count_devices(count)

    def _count_devices(self, count: int) -> None:
        """Take the devices there are; once taken, each is found again by its UUID and keeps its index."""
        if not self._devices:
            devices = [GpuDevice(self._nvml, index, self._processes) for index in range(count)]
            for device in devices:
                device.open()
            try:
                self._watched = select_gpus(devices, self._selection)
            except ConfigError:
                self.close()
                raise
            self._devices = devices
            return
        places = self._find_uuids(count)
        # A GPU that fell off the bus may be counted no more; those after it have moved up then.
        is_complete = count >= len(self._devices)
        for device in self._devices:
            device.nvml_index = places.get(device.uuid, device.index if is_complete else None)

    def _find_uuids(self, count: int) -> dict[str | None, int]:
        places: dict[str | None, int] = {}
        for index in range(count):
            try:
                places[self._nvml.nvmlDeviceGetUUID(self._nvml.nvmlDeviceGetHandleByIndex(index))] = index
            except self._nvml.NVMLError as error:
                if error.value in NVML_LOST:
                    raise
        return places

    def _read_devices(self) -> tuple[GpuSample, ...]:
        """Read the GPUs, and of one of them, by turns, how busy each process keeps it."""
        turn = None
        if monotonic() >= self._utilization_at_s + _PROCESS_UTILIZATION_S:
            self._utilization_at_s = monotonic()
            turn = self._utilization_turn = (self._utilization_turn + 1) % len(self._watched)
        return tuple(device.read(reads_process_utilization=place == turn) for place, device in enumerate(self._watched))

    def _read_driver(self) -> DriverSample:
        version, cuda = self._ask("nvmlSystemGetDriverVersion"), self._ask("nvmlSystemGetCudaDriverVersion")
        return DriverSample(
            version=version.decode() if isinstance(version, bytes) else version,
            cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        )

    def _ask(self, function: str) -> Any:
        try:
            return getattr(self._nvml, function)()
        except self._nvml.NVMLError as error:
            if error.value in NVML_LOST:
                raise
            return None

    def _fail(self, problem: Problem) -> None:
        self.close()
        self._problem = problem
        self._retry_at_s = monotonic() + RETRY_S
