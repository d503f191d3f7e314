"""Reads CPU, memory, swap and disks of the machine; what the system does not tell is None."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsft.monitor.memory_limit import MemoryLimit, find_memory_limit
from dsft.monitor.sample import HostSample

_SECTOR_BYTES = 512
"""Of /proc/diskstats, whatever the disk's own are (kernel: Documentation/admin-guide/iostats.rst)."""

_MEMORY_KEYS = (b"MemTotal", b"MemAvailable", b"SwapTotal", b"SwapFree")


@dataclass(frozen=True)
class _CpuTimes:
    """Time of all cores together since boot."""

    idle_s: float
    total_s: float


@dataclass(frozen=True)
class _DiskBytes:
    """What whole physical disks have read and written since boot, and when that was read."""

    by_disk: dict[str, tuple[int, int]]
    time_s: float


@dataclass(frozen=True)
class _Memory:
    used_bytes: int | None
    available_bytes: int | None
    total_bytes: int | None
    swap_used_bytes: int | None
    swap_total_bytes: int | None


class HostReader:
    """Reads the host.

    Args:
        folder: The file system that holds it is told; the working folder by default.
        root: Where /proc and /sys are.
    """

    def __init__(self, folder: Path | None = None, root: Path = Path("/")) -> None:
        self._folder = str(folder) if folder is not None else _find_working_folder()
        self._root = root
        self._meminfo = root / "proc/meminfo"
        self._diskstats = root / "proc/diskstats"
        self._num_cpus = os.cpu_count()
        self._is_disk: dict[str, bool] = {}
        self._cpu: _CpuTimes | None = None
        self._disks: _DiskBytes | None = None
        total_bytes = self._read_meminfo().get(b"MemTotal")
        self._limit: MemoryLimit | None = None if total_bytes is None else find_memory_limit(total_bytes, root)

    def read(self) -> HostSample:
        """Return what the system says now; rates and CPU are since the read before."""
        memory = self._read_memory()
        used, free, total = self._read_disk_usage()
        read, written = self._read_disk_rates()
        return HostSample(
            num_cpus=self._num_cpus,
            cpu_percent=self._read_cpu_percent(),
            load_average_1_min=_read_load(),
            memory_used_bytes=memory.used_bytes,
            memory_available_bytes=memory.available_bytes,
            memory_total_bytes=memory.total_bytes,
            swap_used_bytes=memory.swap_used_bytes,
            swap_total_bytes=memory.swap_total_bytes,
            disk_path=self._folder,
            disk_used_bytes=used,
            disk_free_bytes=free,
            disk_total_bytes=total,
            disk_read_bytes_per_s=read,
            disk_write_bytes_per_s=written,
        )

    def _read_cpu_percent(self) -> float | None:
        before, self._cpu = self._cpu, _read_cpu_times()
        if before is None or self._cpu is None:
            return None
        total_s = self._cpu.total_s - before.total_s
        if total_s <= 0:
            return None
        # The kernel's count of idle time may step back a little.
        return round(min(100.0, max(0.0, 100 * (1 - (self._cpu.idle_s - before.idle_s) / total_s))), 1)

    def _read_memory(self) -> _Memory:
        values = self._read_meminfo()
        total, available = values.get(b"MemTotal"), values.get(b"MemAvailable")
        used = _subtract(total, available)
        limited = self._limit.read() if self._limit is not None else None
        if limited is not None and total is not None and limited.limit_bytes < total:
            total, used = limited.limit_bytes, limited.used_bytes
            room = max(0, total - used)
            available = room if available is None else min(room, available)
        swap_total = values.get(b"SwapTotal")
        return _Memory(used, available, total, _subtract(swap_total, values.get(b"SwapFree")), swap_total)

    def _read_meminfo(self) -> dict[bytes, int]:
        # One read for memory and swap; psutil takes two files more, and puts 0 where a value is not told.
        try:
            lines = self._meminfo.read_bytes().splitlines()
        except OSError:
            return {}
        found = {}
        for line in lines:
            key, _, value = line.partition(b":")
            number = value.split()
            if key in _MEMORY_KEYS and number and number[0].isdigit():
                found[key] = int(number[0]) * 1024
        return found

    def _read_disk_usage(self) -> tuple[int | None, int | None, int | None]:
        try:
            usage = psutil.disk_usage(self._folder) if self._folder is not None else None
        except OSError:
            usage = None
        if usage is None or usage.total == 0:  # a file system without a size, such as /proc
            return None, None, None
        return usage.used, usage.free, usage.total

    def _read_disk_rates(self) -> tuple[float | None, float | None]:
        before, self._disks = self._disks, self._read_disk_bytes()
        if before is None or self._disks is None:
            return None, None
        duration_s = self._disks.time_s - before.time_s
        both = before.by_disk.keys() & self._disks.by_disk.keys()  # a disk that came has no rate yet
        if duration_s <= 0 or not both:
            return None, None
        read, written = (
            sum(self._disks.by_disk[name][side] - before.by_disk[name][side] for name in both) / duration_s
            for side in (0, 1)
        )
        return (round(read, 2), round(written, 2)) if read >= 0 and written >= 0 else (None, None)

    def _read_disk_bytes(self) -> _DiskBytes | None:
        by_disk = {}
        try:
            for line in self._diskstats.read_text(encoding="utf-8").splitlines():
                # Major, minor, name; then sectors read are the third figure and those written the seventh.
                fields = line.split(None, 10)
                if len(fields) > 9 and self._is_whole_disk(fields[2]):
                    by_disk[fields[2]] = (int(fields[5]) * _SECTOR_BYTES, int(fields[9]) * _SECTOR_BYTES)
        except (OSError, ValueError):
            return None
        return _DiskBytes(by_disk, time.monotonic())

    def _is_whole_disk(self, name: str) -> bool:
        """Return whether a block device is a disk: no partition of one, and nothing that is made of others or of files.

        Loop devices, device mapper, RAID and RAM disks have no device behind them; paths of one NVMe disk are hidden.
        """
        if name not in self._is_disk:
            folder = self._root / "sys/block" / name.replace("/", "!")
            self._is_disk[name] = (folder / "device").exists() and not _is_hidden(folder)
        return self._is_disk[name]


def _is_hidden(folder: Path) -> bool:
    try:
        return (folder / "hidden").read_bytes().strip() == b"1"
    except OSError:
        return False


def _read_cpu_times() -> _CpuTimes | None:
    try:
        times = psutil.cpu_times()
    except (OSError, ValueError, IndexError):
        return None
    # Time for guests is counted as the user's, too.
    total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return _CpuTimes(times.idle + getattr(times, "iowait", 0.0), total_s)


def _read_load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _subtract(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else whole - part


def _find_working_folder() -> str | None:
    try:
        return str(Path.cwd())
    except OSError:  # it has been removed
        return None
