"""What never changes about a GPU while its handle is good; costly for the driver, so it is read once."""

from dataclasses import dataclass

from dsft.monitor.nvml.questions import Questions


@dataclass(frozen=True)
class GpuFacts:
    """Facts of one handle; the fields are those of `GpuSample`, but for the last.

    Attributes:
        num_fans: None where it does not say.
    """

    uuid: str | None = None
    name: str | None = None
    pci_bus_id: str | None = None
    temperature_slowdown_c: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    pcie_generation_max: int | None = None
    pcie_width_max: int | None = None
    is_ecc_enabled: bool | None = None
    is_mig_enabled: bool | None = None
    num_fans: int | None = None


def read_facts(questions: Questions) -> GpuFacts:
    """Read them.

    Raises:
        NVMLError: The device or NVML as a whole is lost.
    """
    nvml = questions.nvml
    ecc_mode = questions.ask("nvmlDeviceGetEccMode")
    mig_mode = questions.ask("nvmlDeviceGetMigMode")
    return GpuFacts(
        uuid=questions.ask_text("nvmlDeviceGetUUID"),
        name=questions.ask_text("nvmlDeviceGetName"),
        pci_bus_id=_read_bus_id(questions),
        temperature_slowdown_c=questions.ask_number(
            "nvmlDeviceGetTemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        ),
        sm_clock_max_mhz=questions.ask_number("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        memory_clock_max_mhz=questions.ask_number("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
        pcie_generation_max=questions.ask_number("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_width_max=questions.ask_number("nvmlDeviceGetMaxPcieLinkWidth"),
        is_ecc_enabled=None if ecc_mode is None else bool(ecc_mode[0]),
        is_mig_enabled=None if mig_mode is None else bool(mig_mode[0]),
        num_fans=questions.ask_number("nvmlDeviceGetNumFans"),
    )


def _read_bus_id(questions: Questions) -> str | None:
    info = questions.ask("nvmlDeviceGetPciInfo")
    if info is None:
        return None
    bus_id = info.busId
    return bus_id.decode(errors="replace") if isinstance(bus_id, bytes) else str(bus_id)
