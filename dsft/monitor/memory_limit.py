"""The limit that a control group (a container, a service, a session) sets to the memory of the processes in it."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LimitedMemory:
    """Memory of a control group.

    Attributes:
        limit_bytes: What its processes may have together.
        used_bytes: What they have, without the file pages that are given up where room is needed.
    """

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class MemoryLimit:
    """A control group whose memory is limited, and the files that tell it.

    Attributes:
        folder: The group.
        limit_file: Name of the file that holds its limit.
        usage_file: Name of the file that holds its use, file pages included.
        inactive_key: Key in memory.stat of the file pages that can be given up.
    """

    folder: Path
    limit_file: str
    usage_file: str
    inactive_key: bytes

    def read_limit_bytes(self) -> int | None:
        """Return the limit in force now; None where there is none, or it can't be read."""
        return _read_number(self.folder / self.limit_file)

    def read(self) -> LimitedMemory | None:
        """Return limit and use now; None where they can't be read."""
        limit_bytes = self.read_limit_bytes()
        usage_bytes = _read_number(self.folder / self.usage_file)
        inactive_bytes = self._read_inactive_bytes()
        if limit_bytes is None or usage_bytes is None or inactive_bytes is None:
            return None
        return LimitedMemory(limit_bytes, max(0, usage_bytes - inactive_bytes))

    def _read_inactive_bytes(self) -> int | None:
        try:
            content = (self.folder / "memory.stat").read_bytes()
        except OSError:
            return None
        found = re.search(rb"^" + self.inactive_key + rb" (\d+)$", content, re.MULTILINE)
        return int(found[1]) if found is not None else None


def find_memory_limit(total_bytes: int, root: Path = Path("/")) -> MemoryLimit | None:
    """Return the control group with the lowest limit of those that this process is in.

    Args:
        total_bytes: Memory of the machine; a limit above that is none.
        root: Where /proc and the groups are.
    """
    try:
        groups = _list_groups(root)
    except (OSError, ValueError, IndexError):
        return None
    limits = [(limit, group) for group in groups if (limit := group.read_limit_bytes()) is not None]
    limit_bytes, group = min(limits, key=lambda pair: pair[0], default=(total_bytes, None))
    return group if limit_bytes < total_bytes else None


def _list_groups(root: Path) -> list[MemoryLimit]:
    paths = dict(_read_paths(root))
    groups: list[MemoryLimit] = []
    for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ")[:3]
        mount_root, mount_point = mount.split(" ")[3:5]
        is_old = kind == "cgroup" and "memory" in options.split(",")
        if (is_old or kind == "cgroup2") and kind in paths:
            top = root / _unescape(mount_point).lstrip("/")
            for folder in _list_folders(top, _unescape(mount_root), paths[kind]):
                if is_old:
                    group = MemoryLimit(
                        folder, "memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file"
                    )
                else:
                    group = MemoryLimit(folder, "memory.max", "memory.current", b"inactive_file")
                groups.append(group)
    return groups


def _read_paths(root: Path) -> list[tuple[str, str]]:
    """Return the group of this process in each hierarchy that may limit memory, by the kind of its file system."""
    text = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    found = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append(("cgroup2", path))
        elif "memory" in controllers.split(","):
            found.append(("cgroup", path))
    return found


def _list_folders(top: Path, mount_root: str, path: str) -> list[Path]:
    """Return the folders of a group and of all above it, as far as they are mounted here.

    In a container the mount may begin at its own group, which its path does not know of.
    """
    inside = path.removeprefix(mount_root.rstrip("/")) if (path + "/").startswith(mount_root.rstrip("/") + "/") else ""
    names = [name for name in inside.split("/") if name]
    if ".." in names:
        names = []
    return [top.joinpath(*names[:depth]) for depth in range(len(names), -1, -1)]


def _unescape(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)  # spaces, mostly


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):  # "max" is no limit
        return None
