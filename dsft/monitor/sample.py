"""One look at everything that is watched; the fields are the keys of `dsft monitor --json` (docs/monitor.md).

A value that the driver, the card or the system does not tell is None, never 0. Bytes, seconds, watts, MHz and degrees
Celsius stand in the names; percentages go from 0 to 100.
"""

from dataclasses import dataclass, field

SCHEMA = 1
"""Goes up when a key of the JSON objects changes its meaning or goes away; new keys may come without that."""


@dataclass(frozen=True)
class Problem:
    """Why a GPU, or NVML as a whole, can't be read.

    Attributes:
        kind: One of no_driver, driver_not_loaded, version_mismatch, no_permission, no_gpu, gpu_lost, nvml_error.
        found: One sentence: what was found.
        fix: One sentence: what to do about it.
    """

    kind: str
    found: str
    fix: str


@dataclass(frozen=True)
class DriverSample:
    """The NVIDIA driver.

    Attributes:
        version: E.g. `580.159.04`.
        cuda_version: The newest CUDA version it can run, e.g. `13.0`.
    """

    version: str | None
    cuda_version: str | None


@dataclass(frozen=True)
class ProcessSample:
    """One process that uses a GPU.

    Attributes:
        pid: As the driver tells it: the host's count, in a container too.
        kind: compute, graphics or compute+graphics.
        memory_used_bytes: GPU memory it has on this device.
        sm_utilization_percent: Share of the last moments in which its kernels ran.
        user: Owner's name, or the number where it has no name here.
        command: Program and arguments, secrets masked, control characters replaced.
        is_visible: Whether the process can be seen from here. Inside a container those of the host and of other
            containers can't, and a local process of the same number is another one.
        container_pid: Its PID in the container it runs in, where that is another.
        container_id: First characters of that container's id.
    """

    pid: int
    kind: str
    memory_used_bytes: int | None
    sm_utilization_percent: float | None = None
    user: str | None = None
    command: str | None = None
    is_visible: bool = True
    container_pid: int | None = None
    container_id: str | None = None


@dataclass(frozen=True)
class MigSample:
    """One MIG instance of a GPU: a part of it that programs see as a device of its own."""

    index: int
    uuid: str | None
    name: str | None
    memory_used_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_total_bytes: int | None = None
    processes: tuple[ProcessSample, ...] | None = None


@dataclass(frozen=True)
class GpuSample:
    """One GPU. With MIG on, memory and processes of its parts stand in `migs`, and utilisation is not told.

    Attributes:
        index: As NVML counts (PCI order), whatever CUDA_VISIBLE_DEVICES says.
        problem: Why it can't be read; then all that follows `name` is None.
        memory_used_bytes: By processes and their contexts, as nvidia-smi shows it.
        memory_reserved_bytes: By the driver and its firmware. Used, reserved and free make the total.
        gpu_utilization_percent: Share of the last moments in which any kernel ran.
        memory_bandwidth_utilization_percent: Share of them in which its memory was read or written.
        temperature_slowdown_c: From which temperature on the card slows itself down.
        power_limit_w: The limit in force.
        sm_clock_mhz: Clock of the multiprocessors.
        pcie_rx_bytes_per_s: Host to GPU, over 20 ms of a measurement that may be a few samples old; the first of many
            samples has none.
        fan_percent: The fastest fan, of its greatest speed; may pass 100.
        throttle_reasons: Why the clocks are lower than they could be (throttle.py has the names and their words);
            empty where there is no reason, None where it is not told.
        ecc_uncorrected_errors: Since the driver was loaded.
        ecc_uncorrected_errors_lifetime: Since the card was made.
        processes: Most memory first; None where they are not told.
    """

    index: int
    uuid: str | None
    name: str | None
    problem: Problem | None = None
    pci_bus_id: str | None = None
    memory_used_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_total_bytes: int | None = None
    gpu_utilization_percent: float | None = None
    memory_bandwidth_utilization_percent: float | None = None
    temperature_c: float | None = None
    temperature_slowdown_c: float | None = None
    memory_temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    performance_state: str | None = None
    sm_clock_mhz: float | None = None
    sm_clock_max_mhz: float | None = None
    memory_clock_mhz: float | None = None
    memory_clock_max_mhz: float | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_rx_bytes_per_s: float | None = None
    pcie_tx_bytes_per_s: float | None = None
    fan_percent: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    is_ecc_enabled: bool | None = None
    ecc_corrected_errors: int | None = None
    ecc_uncorrected_errors: int | None = None
    ecc_corrected_errors_lifetime: int | None = None
    ecc_uncorrected_errors_lifetime: int | None = None
    is_mig_enabled: bool | None = None
    migs: tuple[MigSample, ...] = ()
    processes: tuple[ProcessSample, ...] | None = None


@dataclass(frozen=True)
class HostSample:
    """CPU, memory, swap and disk of the machine.

    Attributes:
        cpu_percent: Of all cores together, since the sample before; None in the first.
        memory_available_bytes: What programs can still take without swapping.
        disk_path: A folder on the file system that is told: the working folder.
        disk_read_bytes_per_s: From all disks, since the sample before; None in the first.
    """

    num_cpus: int | None = None
    cpu_percent: float | None = None
    load_average_1_min: float | None = None
    memory_used_bytes: int | None = None
    memory_available_bytes: int | None = None
    memory_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    swap_total_bytes: int | None = None
    disk_path: str | None = None
    disk_used_bytes: int | None = None
    disk_free_bytes: int | None = None
    disk_total_bytes: int | None = None
    disk_read_bytes_per_s: float | None = None
    disk_write_bytes_per_s: float | None = None


@dataclass(frozen=True)
class RunSample:
    """A `dsft train` that is going on or has ended under the monitor's eyes, as its event log tells it.

    Attributes:
        pid: Its process, in the PID namespace it runs in.
        started: When the process began, ISO 8601.
        event_log: Absolute path of its event log.
        stage: loading (no step has begun), training, validating, saving, stopping (a signal came), or unknown where its
            event log can't be read from here.
        first_step: Step this process went on from.
        loss: Of the newest step, mean cross-entropy per target token in nats.
        recent_losses: Of the newest steps, oldest first.
        tok_per_s: Over the last steps; None where the run is overdue or has ended.
        eta_s: Seconds left when the newest step was done, less what has passed since; None like `tok_per_s`.
        predicted_memory_bytes: Peak of the whole device that was predicted for the plan in force; None on a CPU.
        peak_memory_bytes: The most the whole device had in use at the end of a step under that plan.
        last_event_age_s: Seconds since it last told anything; None where the run has ended.
        is_overdue: Whether that is longer than the next step, or what else it does, should take.
        outcome: None while it goes on; finished, stopped (by a signal), failed; killed where it has told no end; or
            unknown where its event log has nothing of it, or can't be read.
        ended: When it last told anything, ISO 8601, or when it was missed; None while it goes on.
    """

    pid: int
    run_name: str
    started: str
    event_log: str
    stage: str = "loading"
    model_name: str | None = None
    device: str | None = None
    first_step: int | None = None
    step: int | None = None
    num_steps: int | None = None
    epoch: float | None = None
    num_epochs: float | None = None
    loss: float | None = None
    recent_losses: tuple[float, ...] = ()
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    tok_per_s: float | None = None
    step_s: float | None = None
    eta_s: float | None = None
    predicted_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    last_event_age_s: float | None = None
    is_overdue: bool = False
    outcome: str | None = None
    ended: str | None = None


@dataclass(frozen=True)
class AlertSample:
    """One limit on one GPU or MIG instance (or on the host).

    Attributes:
        alert: The limit, e.g. `vram>95`.
        metric: What is limited, e.g. `vram`.
        unit: Of limit and value, e.g. `%`.
        gpu_index: On which GPU; None for the host's values.
        value: What was read; None where it can't be told.
        is_fired: Whether the limit is passed now; None where the value can't be told.
        mig_index: On which MIG instance of that GPU; None for a whole GPU and the host.
    """

    alert: str
    metric: str
    unit: str
    gpu_index: int | None
    value: float | None
    is_fired: bool | None
    mig_index: int | None = None


@dataclass(frozen=True)
class Sample:
    """Everything that was read at one time.

    Attributes:
        time: ISO 8601 with milliseconds, UTC.
        schema: Version of this layout.
        problem: Why no GPU at all can be read; then `gpus` is empty.
        driver: None where NVML does not answer.
        gpus: By index.
        host: None where it was not asked for.
        runs: Training runs that are going on on this machine, oldest first, then those that ended lately, newest first.
        alerts: Every limit that was asked for, on every GPU it is judged on.
    """

    time: str
    schema: int = SCHEMA
    problem: Problem | None = None
    driver: DriverSample | None = None
    gpus: tuple[GpuSample, ...] = ()
    host: HostSample | None = None
    runs: tuple[RunSample, ...] = ()
    alerts: tuple[AlertSample, ...] = field(default=())
