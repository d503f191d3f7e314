"""What the monitor's screen knows: the newest sample, a history of each GPU, and what keys have changed. No drawing."""

from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from itertools import islice

from dsft.cli.views.monitor.fired import FiredAlerts, UnknownAlerts
from dsft.monitor.sample import AlertSample, GpuSample, ProcessSample, Sample
from dsft.monitor.shares import to_percent, vram_percent

HISTORY_LENGTH = 600
"""Samples of a GPU that are kept; more than the widest terminal has columns."""


class SortOrder(StrEnum):
    """What the processes are sorted by; the values are what the screen calls it."""

    MEMORY = "most memory first"
    PID = "by PID"
    USER = "by user"
    GPU = "by GPU"
    COMMAND = "by command"
    SM = "most SM first"


class GpuHistory:
    """Percentages of the last samples of one GPU, oldest first; None where one was not told."""

    def __init__(self) -> None:
        self.memory: deque[float | None] = deque(maxlen=HISTORY_LENGTH)
        self.util: deque[float | None] = deque(maxlen=HISTORY_LENGTH)
        self.bandwidth: deque[float | None] = deque(maxlen=HISTORY_LENGTH)
        self.power: deque[float | None] = deque(maxlen=HISTORY_LENGTH)

    def take(self, gpu: GpuSample) -> None:
        """Add a sample of the GPU."""
        self.memory.append(vram_percent(gpu))
        self.util.append(gpu.gpu_utilization_percent)
        self.bandwidth.append(gpu.memory_bandwidth_utilization_percent)
        self.power.append(to_percent(gpu.power_w, gpu.power_limit_w))

    def copy(self) -> "GpuHistory":
        """Return a history that stands still while this one goes on."""
        twin = GpuHistory()
        for mine, its in zip(vars(self).values(), vars(twin).values(), strict=True):
            its.extend(mine)
        return twin


class MonitorState:
    """Everything the screen shows.

    Args:
        interval_s: Time from one sample to the next.
        has_keys: Whether anything can be typed.
        host_name: Of this machine, told where there is room; empty for not at all.

    Attributes:
        sample: What is shown; None before the first one.
        newest: The last one taken, which is another while the screen stands still.
        order: What the processes are sorted by.
        scroll: How many processes are above the first one shown.
        is_paused: Whether the screen stands still. Samples go on being taken, for the history, alerts and a CSV file.
        shows_help: Whether the keys are explained instead of all else.
        unknown_alerts: Limits that can't be judged now.
    """

    def __init__(self, interval_s: float, *, has_keys: bool = True, host_name: str = "") -> None:
        self.interval_s = interval_s
        self.host_name = host_name
        self.has_keys = has_keys
        self.sample: Sample | None = None
        self.order = SortOrder.MEMORY
        self.scroll = 0
        self.is_paused = False
        self.shows_help = False
        self.newest: Sample | None = None
        self._histories: dict[str | int, GpuHistory] = {}
        self._shown_histories = self._histories
        self.unknown_alerts: list[AlertSample] = []
        self._fired = FiredAlerts()
        self._unknown = UnknownAlerts()

    def take(self, sample: Sample) -> bool:
        """Take the newest sample, and return whether an alert began to fire with it."""
        self.newest = sample
        for gpu in sample.gpus:
            self._histories.setdefault(_identify(gpu), GpuHistory()).take(gpu)
        if not self.is_paused:
            self.sample = sample
        self._unknown.take(sample.alerts)
        self.unknown_alerts = self._unknown.now
        return any(alert.is_fired for alert in self._fired.take(sample.alerts))

    def history(self, gpu: GpuSample) -> GpuHistory:
        """Return the history of a GPU that goes with the sample shown."""
        return self._shown_histories.get(_identify(gpu)) or GpuHistory()

    def press(self, key: str, num_processes: int, num_shown: int) -> bool:
        """Do what a key asks for.

        Args:
            key: A character, or the name `terminal_keys` gives it.
            num_processes: How many there are.
            num_shown: For how many the screen has room.

        Returns:
            Whether anything changed.
        """
        if self.shows_help:
            self.shows_help = False
            return True
        page = max(1, num_shown)
        last = max(0, num_processes - num_shown)
        moves = {
            "up": self.scroll - 1,
            "down": self.scroll + 1,
            "page_up": self.scroll - page,
            "page_down": self.scroll + page,
            "home": 0,
            "end": last,
        }
        if key in moves:
            before, self.scroll = self.scroll, min(last, max(0, moves[key]))
            return self.scroll != before
        match key:
            case "p":
                self._toggle_pause()
            case "s":
                orders = list(SortOrder)
                self.order = orders[(orders.index(self.order) + 1) % len(orders)]
                self.scroll = 0
            case "h" | "?":
                self.shows_help = True
            case _:
                return False
        return True

    def _toggle_pause(self) -> None:
        self.is_paused = not self.is_paused
        if self.is_paused:
            self._shown_histories = {key: history.copy() for key, history in self._histories.items()}
        else:
            self._shown_histories = self._histories
            self.sample = self.newest


def newest(values: Sequence[float | None] | deque[float | None], num_values: int) -> list[float | None]:
    """Return the last values of a history, with None before the first one where there are fewer."""
    kept = list(islice(reversed(values), num_values))
    return [None] * (num_values - len(kept)) + kept[::-1]


def list_processes(sample: Sample, order: SortOrder) -> list[tuple[str, ProcessSample]]:
    """Return the processes of all GPUs with the names of the devices they are on, e.g. `0`, or `0/2` for a MIG."""
    found = []
    for gpu in sample.gpus:
        found += [(str(gpu.index), process) for process in gpu.processes or ()]
        for mig in gpu.migs:
            found += [(f"{gpu.index}/{mig.index}", process) for process in mig.processes or ()]
    # The list comes by GPU, and each GPU's by memory; sorting keeps that among equals.
    match order:
        case SortOrder.MEMORY:
            found.sort(key=lambda row: _with_untold_least(row[1].memory_used_bytes), reverse=True)
        case SortOrder.SM:
            found.sort(key=lambda row: _with_untold_least(row[1].sm_utilization_percent), reverse=True)
        case SortOrder.PID:
            found.sort(key=lambda row: row[1].pid)
        case SortOrder.USER:
            found.sort(key=lambda row: (row[1].user is None, row[1].user or ""))
        case SortOrder.COMMAND:
            found.sort(key=lambda row: (row[1].command is None, row[1].command or ""))
    return found


def _with_untold_least(value: float | None) -> float:
    return -1 if value is None else value


def _identify(gpu: GpuSample) -> str | int:
    return gpu.uuid or gpu.index
