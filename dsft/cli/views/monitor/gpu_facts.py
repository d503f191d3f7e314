"""What is told of a GPU beside its bars, as parts of a row: clocks, PCIe, fan, errors, what holds it back."""

from dsft.cli.views.monitor.figures import MISSING, format_figure, format_rate, format_share, heat_style
from dsft.cli.views.monitor.line import Line, labelled, printable
from dsft.monitor.sample import DriverSample, GpuSample, MigSample
from dsft.monitor.throttle import explain_reasons


def describe_name(gpu: GpuSample) -> Line:
    """Return index and name."""
    return Line(f"GPU {gpu.index}", "bold cyan").add(f" {printable(gpu.name or MISSING)}", "bold")


def name_mig(mig: MigSample) -> str:
    """Return an instance's index and profile, e.g. `MIG 2 1g.18gb`: its name begins with that of the GPU."""
    return f"MIG {mig.index} {printable(mig.name or MISSING).rpartition('MIG ')[2]}"


def describe_driver(driver: DriverSample | None) -> Line:
    """Return the versions of the driver and of CUDA, as far as they are told."""
    parts = []
    if driver is not None and driver.version is not None:
        parts.append(f"driver {printable(driver.version)}")
    if driver is not None and driver.cuda_version is not None:
        parts.append(f"CUDA {printable(driver.cuda_version)}")
    return Line(" · ".join(parts), "dim")


def describe_mode(gpu: GpuSample) -> Line:
    """Return performance state, and MIG where it is on."""
    if gpu.problem is not None:
        return Line()
    line = Line(gpu.performance_state or f"state {MISSING}", "dim")
    return line.add(" · MIG on", "dim") if gpu.is_mig_enabled else line


def describe_throttle(gpu: GpuSample) -> Line:
    """Return in words what holds the clocks back; a brake stands out, by its colour and by a mark."""
    if gpu.throttle_reasons is None:
        return Line(MISSING, "dim")
    line = Line()
    for reason in explain_reasons(gpu.throttle_reasons):
        if line.width:
            line.add(" · ", "dim")
        if reason.is_alarming:
            line.add(f"! {reason.words}", "bold red")
        elif reason.is_brake:
            line.add(f"! {reason.words}", "bold yellow")
        else:
            line.add(reason.words, "dim")
    return line if line.width else Line("none", "dim")


def is_braked(gpu: GpuSample) -> bool:
    """Return whether work on the GPU is slowed down."""
    return any(reason.is_brake for reason in explain_reasons(gpu.throttle_reasons or ()))


def describe_ecc(gpu: GpuSample) -> Line:
    """Return errors of its memory; they stand out where there are any."""
    if gpu.is_ecc_enabled is False:
        return labelled("ECC", "off", "dim")
    uncorrected, corrected = gpu.ecc_uncorrected_errors, gpu.ecc_corrected_errors
    if uncorrected is None and corrected is None:
        return labelled("ECC", MISSING, "dim")
    line = Line("ECC ", "dim")
    if uncorrected:
        line.add(f"! {uncorrected} uncorrected", "bold red")
    if corrected:
        line.add(", " if uncorrected else "").add(f"{corrected} corrected", "yellow")
    if not uncorrected and not corrected:
        line.add("0 errors" if uncorrected is not None else f"{MISSING} uncorrected", "dim")
    if gpu.ecc_uncorrected_errors_lifetime:
        line.add(f" ({gpu.ecc_uncorrected_errors_lifetime} uncorrected ever)", "yellow")
    return line


def describe_temperature(gpu: GpuSample) -> Line:
    """Return temperature and from where on the card slows itself down."""
    style = heat_style(gpu.temperature_c, gpu.temperature_slowdown_c)
    return labelled("temp", format_share(gpu.temperature_c, gpu.temperature_slowdown_c, "°C"), style)


def describe_heat(gpu: GpuSample) -> list[Line]:
    """Return what else tells of heat: the memory's temperature and the fan."""
    return [
        labelled("mem temp", format_figure(gpu.memory_temperature_c, "°C")),
        labelled("fan", format_figure(gpu.fan_percent, "%")),
    ]


def describe_clocks(gpu: GpuSample, *, is_short: bool = False) -> list[Line]:
    """Return the clocks of multiprocessors and memory, now and at most."""
    sm_max = None if is_short else gpu.sm_clock_max_mhz
    memory_max = None if is_short or gpu.memory_clock_mhz == gpu.memory_clock_max_mhz else gpu.memory_clock_max_mhz
    return [
        labelled("SM", format_share(gpu.sm_clock_mhz, sm_max, "MHz")),
        labelled("mem clock", format_share(gpu.memory_clock_mhz, memory_max, "MHz")),
    ]


def describe_pcie(gpu: GpuSample, *, is_short: bool = False) -> list[Line]:
    """Return the PCIe link, what it could be where it is less, and what passes over it."""
    link = _format_link(gpu.pcie_generation, gpu.pcie_width)
    line = labelled("PCIe", link)
    is_less = _is_less(gpu.pcie_generation, gpu.pcie_generation_max) or _is_less(gpu.pcie_width, gpu.pcie_width_max)
    if is_less and not is_short:
        # An idle card lowers its link to save power, so this is a fact and no alarm.
        line.add(f" of {_format_link(gpu.pcie_generation_max, gpu.pcie_width_max)}", "dim")
    return [
        line,
        labelled("in", format_rate(gpu.pcie_rx_bytes_per_s)),
        labelled("out", format_rate(gpu.pcie_tx_bytes_per_s)),
    ]


def _format_link(generation: int | None, width: int | None) -> str:
    if generation is None and width is None:
        return MISSING
    first = MISSING if generation is None else str(generation)
    second = MISSING if width is None else str(width)
    return f"gen {first} ×{second}"


def _is_less(now: int | None, most: int | None) -> bool:
    return now is not None and most is not None and now < most
