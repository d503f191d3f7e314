"""The host's figures: what is made of /proc and /sys, and what is told where they say nothing."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dsft.core.units import GIB
from dsft.monitor.host import HostReader

MEMINFO = """MemTotal:       33554432 kB
MemFree:         1048576 kB
MemAvailable:   25165824 kB
SwapTotal:       2097152 kB
SwapFree:        1048576 kB
HugePages_Total:       0
"""


def diskstats(sectors: int) -> str:
    names = ("sda", "sda1", "nvme0n1", "nvme0n1p1", "nvme0c0n1", "dm-0", "md0", "loop0", "zram0", "cciss/c0d0")
    return "".join(
        f" 8 {minor} {name} 10 0 {1000 + sectors} 5 10 0 {2000 + 2 * sectors} 5 0 5 5\n"
        for minor, name in enumerate(names)
    )


def write(root: Path, name: str, content: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 32 GiB, without a container's limit, and with three disks."""
    write(tmp_path, "proc/meminfo", MEMINFO)
    write(tmp_path, "proc/diskstats", diskstats(0))
    for name in ("sda", "nvme0n1", "nvme0c0n1", "cciss!c0d0"):
        (tmp_path / "sys/block" / name / "device").mkdir(parents=True)
    write(tmp_path, "sys/block/nvme0c0n1/hidden", "1\n")
    write(tmp_path, "sys/block/sda/hidden", "0\n")
    for name in ("dm-0", "md0", "loop0", "zram0"):
        (tmp_path / "sys/block" / name).mkdir(parents=True)
    return tmp_path


def test_this_machine(tmp_path: Path) -> None:
    reader = HostReader(tmp_path)
    first = reader.read()
    deadline_s = time.process_time() + 0.2
    while time.process_time() < deadline_s:
        pass
    second = reader.read()
    assert first.cpu_percent is None and first.disk_read_bytes_per_s is None and first.disk_write_bytes_per_s is None
    assert second.cpu_percent is not None and 0 < second.cpu_percent <= 100
    assert second.num_cpus == os.cpu_count()
    assert second.load_average_1_min == pytest.approx(os.getloadavg()[0], abs=1)
    memory = psutil.virtual_memory()
    assert second.memory_total_bytes is not None and 0 < second.memory_total_bytes <= memory.total
    assert second.memory_available_bytes is not None and 0 < second.memory_available_bytes <= second.memory_total_bytes
    assert second.swap_total_bytes == psutil.swap_memory().total
    usage = psutil.disk_usage(str(tmp_path))
    assert (second.disk_path, second.disk_total_bytes) == (str(tmp_path), usage.total)
    assert second.disk_used_bytes == pytest.approx(usage.used, abs=GIB)


def test_memory_and_swap(root: Path) -> None:
    sample = HostReader(root=root).read()
    assert (sample.memory_total_bytes, sample.memory_available_bytes) == (32 * GIB, 24 * GIB)
    assert sample.memory_used_bytes == 8 * GIB
    assert (sample.swap_used_bytes, sample.swap_total_bytes) == (1 * GIB, 2 * GIB)


def test_a_machine_without_swap_has_none_of_it(root: Path) -> None:
    write(root, "proc/meminfo", MEMINFO.replace("2097152", "0").replace("1048576", "0"))
    sample = HostReader(root=root).read()
    assert (sample.swap_used_bytes, sample.swap_total_bytes) == (0, 0)


def test_what_meminfo_does_not_tell_is_none(root: Path) -> None:
    write(root, "proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable:\nSwapFree: none\n")
    sample = HostReader(root=root).read()
    assert sample.memory_total_bytes == 32 * GIB
    assert (sample.memory_used_bytes, sample.memory_available_bytes) == (None, None)
    assert (sample.swap_used_bytes, sample.swap_total_bytes) == (None, None)


def test_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(psutil, "cpu_times", refuse)
    monkeypatch.setattr(psutil, "disk_usage", refuse)
    monkeypatch.setattr(os, "getloadavg", refuse)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    reader = HostReader(tmp_path, root=tmp_path)
    for sample in (reader.read(), reader.read()):
        told = {name: value for name, value in vars(sample).items() if value is not None}
        assert told == {"disk_path": str(tmp_path)}


def test_a_working_folder_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    there = HostReader()
    gone.rmdir()
    sample = HostReader().read()
    assert (sample.disk_path, sample.disk_total_bytes) == (None, None)
    sample = there.read()
    assert (sample.disk_path, sample.disk_total_bytes, sample.disk_free_bytes) == (str(gone), None, None)


def test_a_file_system_without_a_size_has_no_usage() -> None:
    sample = HostReader(Path("/proc")).read()
    assert (sample.disk_used_bytes, sample.disk_free_bytes, sample.disk_total_bytes) == (None, None, None)


def set_cpu_times(monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
    names = ("user", "system", "idle", "iowait", "guest", "guest_nice")
    values = {name: times.get(name, 0.0) for name in names}

    class Times(SimpleNamespace):
        def __iter__(self):
            return iter(values.values())

    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(**values))


def test_cpu_is_what_neither_idled_nor_waited_since_the_sample_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cpu_times(monkeypatch, user=10, idle=100)
    reader = HostReader(root=root)
    assert reader.read().cpu_percent is None
    set_cpu_times(monkeypatch, user=12, system=1, idle=106, iowait=1, guest=2)  # a guest's time is the user's, too
    assert reader.read().cpu_percent == pytest.approx(30)
    assert reader.read().cpu_percent is None  # no time has passed
    set_cpu_times(monkeypatch, user=22, system=1, idle=105, iowait=1, guest=2)  # idle time that stepped back
    assert reader.read().cpu_percent == 100


def test_cpu_is_told_in_tenths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cpu_times(monkeypatch, user=0.1, idle=100.7)
    reader = HostReader(root=root)
    reader.read()
    set_cpu_times(monkeypatch, user=1.1, idle=102.7)
    assert reader.read().cpu_percent == 33.3
    set_cpu_times(monkeypatch, user=1.1 + 1e-10, idle=105.7)
    assert reader.read().cpu_percent == 0.0


def test_rates_and_load_are_told_in_hundredths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter([10.0, 12.1])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock_s))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.123456, 0, 0))
    reader = HostReader(root=root)
    assert reader.read().load_average_1_min == 0.12
    write(root, "proc/diskstats", diskstats(5))
    assert reader.read().disk_read_bytes_per_s == 3657.14


def test_disk_rates_are_of_whole_disks_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter([10.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock_s))
    reader = HostReader(root=root)
    assert reader.read().disk_read_bytes_per_s is None
    write(root, "proc/diskstats", diskstats(4096))
    sample = reader.read()
    num_disks = 3  # sda, nvme0n1, cciss/c0d0
    assert sample.disk_read_bytes_per_s == num_disks * 4096 * 512 / 2
    assert sample.disk_write_bytes_per_s == num_disks * 2 * 4096 * 512 / 2


@pytest.mark.parametrize(
    "after",
    [None, "", diskstats(-500), "8 0 sda 1 2 x 4 5 6 7 8\n", diskstats(9).replace("sda", "sdb").split("\n")[0]],
    ids=["gone", "no disk", "counters begin anew", "damaged", "other disks"],
)
def test_disk_rates_that_can_t_be_told_are_none(root: Path, after: str | None) -> None:
    reader = HostReader(root=root)
    reader.read()
    path = write(root, "proc/diskstats", after or "")
    if after is None:
        path.unlink()
    sample = reader.read()
    assert (sample.disk_read_bytes_per_s, sample.disk_write_bytes_per_s) == (None, None)


def put_group(folder: Path, limit: str, used_bytes: int, inactive_bytes: int, *, is_old: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("memory.limit_in_bytes" if is_old else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if is_old else "memory.current")).write_text(f"{used_bytes}\n")
    total = "total_" if is_old else ""
    (folder / "memory.stat").write_text(f"anon 5\n{total}inactive_file {inactive_bytes}\nactive_file 7\n")


def limited(root: Path) -> tuple[int | None, int | None, int | None]:
    sample = HostReader(root=root).read()
    return sample.memory_total_bytes, sample.memory_used_bytes, sample.memory_available_bytes


MACHINE = (32 * GIB, 8 * GIB, 24 * GIB)
NEW_MOUNT = "31 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_a_container_s_limit_counts_where_it_is_lower(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/root rw\n" + NEW_MOUNT)
    group = root / "sys/fs/cgroup"
    put_group(group, str(4 * GIB), 3 * GIB, 1 * GIB)
    assert limited(root) == (4 * GIB, 2 * GIB, 2 * GIB)
    reader = HostReader(root=root)
    put_group(group, str(6 * GIB), 3 * GIB, 1 * GIB)  # it was raised meanwhile
    assert reader.read().memory_total_bytes == 6 * GIB
    put_group(group, "max", 3 * GIB, 1 * GIB)
    assert reader.read().memory_total_bytes == 32 * GIB
    for limit in ("max", str(64 * GIB)):
        put_group(group, limit, 3 * GIB, 1 * GIB)
        assert limited(root) == MACHINE


def test_the_machine_may_have_less_room_than_the_limit(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "proc/self/mountinfo", NEW_MOUNT)
    put_group(root / "sys/fs/cgroup", str(30 * GIB), 2 * GIB, 1 * GIB)
    assert limited(root) == (30 * GIB, 1 * GIB, 24 * GIB)


def test_the_lowest_limit_of_all_groups_above_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/user.slice/session 1.scope\n")
    write(root, "proc/self/mountinfo", NEW_MOUNT)
    group = root / "sys/fs/cgroup"
    put_group(group / "user.slice/session 1.scope", str(20 * GIB), 1 * GIB, 0)
    put_group(group / "user.slice", str(10 * GIB), 7 * GIB, 0)
    assert limited(root) == (10 * GIB, 7 * GIB, 3 * GIB)


@pytest.mark.parametrize(
    ("mount_root", "folder"),
    [("/", "docker/abc"), ("/docker/abc", ""), ("/docker", "abc"), ("/elsewhere", "")],
    ids=["of the host", "of the container", "in between", "unknown"],
)
def test_an_old_hierarchy_is_read_too(root: Path, mount_root: str, folder: str) -> None:
    write(root, "proc/self/cgroup", "9:cpu:/\n4:memory:/docker/abc\n0::/\n")
    mount = f"35 31 0:32 {mount_root} /sys/fs/cgroup/mem\\040ory rw - cgroup cgroup rw,memory\n"
    write(root, "proc/self/mountinfo", mount + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n")
    put_group(root / "sys/fs/cgroup/mem ory" / folder, str(4 * GIB), 3 * GIB, 1 * GIB, is_old=True)
    assert limited(root) == (4 * GIB, 2 * GIB, 2 * GIB)


@pytest.mark.parametrize("text", ["", "\n", "0::\n", "x", "0::/../outside\n"])
def test_groups_that_can_t_be_made_out_are_no_limit(root: Path, text: str) -> None:
    write(root, "proc/self/cgroup", text)
    write(root, "proc/self/mountinfo", NEW_MOUNT)
    assert limited(root) == MACHINE
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "proc/self/mountinfo", text)
    assert limited(root) == MACHINE


def test_a_limit_without_its_use_is_left_out(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "proc/self/mountinfo", NEW_MOUNT)
    put_group(root / "sys/fs/cgroup", str(4 * GIB), 3 * GIB, 1 * GIB)
    (root / "sys/fs/cgroup/memory.stat").unlink()
    assert limited(root) == MACHINE
