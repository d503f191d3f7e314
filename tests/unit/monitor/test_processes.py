"""What /proc tells of a process that the driver names: in the initial namespace, in a container, and of those gone."""

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsft.monitor.processes import ProcessReader
from tests.monitor_driver import SECRET, start_processes

INITIAL = "pid:[4026531836]"
OTHER = "pid:[4026532201]"
ID = "0123456789abcdef" * 4


class FakeProc:
    """A /proc of a test's own."""

    def __init__(self, root: Path, namespace: str = INITIAL) -> None:
        self.root = root
        (root / "self/ns").mkdir(parents=True)
        (root / "self/ns/pid").symlink_to(namespace)

    def add(
        self,
        pid: int,
        *,
        arguments: tuple[str, ...] = ("/usr/bin/python3", "x.py"),
        name: str = "python3",
        state: str = "S",
        start_time: int = 100,
        user_id: int = 4_000_000,
        ns_pids: str | None = None,
        cgroup: str = "0::/user.slice\n",
        opened: tuple[str, ...] = (),
    ) -> Path:
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True, exist_ok=True)
        fields = [state, "1", *["0"] * 17, str(start_time), *["0"] * 30]
        (folder / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")
        (folder / "cmdline").write_text("".join(f"{argument}\0" for argument in arguments))
        pids = ns_pids or f"{pid}"
        (folder / "status").write_text(f"Name:\t{name}\nUid:\t1\t{user_id}\t2\t3\nNSpid:\t{pids}\n")
        (folder / "cgroup").write_text(cgroup)
        for number, target in enumerate(opened):
            (folder / f"fd/{number}").symlink_to(target)
        return folder


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc")


@pytest.fixture
def inner_proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc", OTHER)


def test_a_process_of_the_machine(proc: FakeProc) -> None:
    proc.add(535, arguments=("/usr/bin/python3", "train.py", "--token", "x9"))

    facts = ProcessReader(proc.root).read(535)

    assert (facts.command, facts.user, facts.is_visible) == ("python3 train.py --token ***", "4000000", True)
    assert (facts.container_pid, facts.container_id) == (None, None)


def test_a_user_has_a_name_where_the_system_knows_one(proc: FakeProc) -> None:
    me = pwd.getpwuid(os.geteuid())
    proc.add(535, user_id=me.pw_uid)

    assert ProcessReader(proc.root).read(535).user == me.pw_name


def test_a_process_that_is_gone_or_hidden_is_not_visible(proc: FakeProc) -> None:
    facts = ProcessReader(proc.root).read(535)

    assert (facts.is_visible, facts.user, facts.command) == (False, None, None)


def test_a_zombie_is_told_as_one(proc: FakeProc) -> None:
    proc.add(535, state="Z", arguments=())

    facts = ProcessReader(proc.root).read(535)

    assert (facts.command, facts.is_visible) == ("python3 (zombie)", True)


def test_arguments_that_no_rule_was_made_for_end_no_sample(proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> str:
        raise RecursionError

    monkeypatch.setattr("dsft.monitor.processes.describe_command", fail)
    proc.add(535)

    facts = ProcessReader(proc.root).read(535)

    assert (facts.command, facts.user, facts.is_visible) == (None, "4000000", True)


def test_arguments_with_thousands_of_names_are_described(proc: FakeProc) -> None:
    proc.add(535, arguments=("/usr/bin/python3", "a=" * 2000, "x"))

    assert (ProcessReader(proc.root).read(535).command or "").startswith("python3")


@pytest.mark.parametrize("missing", ["status", "cmdline", "cgroup"])
def test_what_can_not_be_read_is_none(proc: FakeProc, missing: str) -> None:
    folder = proc.add(535, cgroup=f"0::/system.slice/docker-{ID}.scope\n")
    (folder / missing).unlink()

    facts = ProcessReader(proc.root).read(535)

    assert facts.is_visible
    told = {"status": facts.user, "cmdline": facts.command, "cgroup": facts.container_id}
    assert [name for name, value in told.items() if value is None] == [missing]


def test_a_file_that_ends_early_is_no_exception(proc: FakeProc) -> None:
    folder = proc.add(535)
    for text in ("", "535", "535 (python3) S 1 2 3", "535 (python3"):
        (folder / "stat").write_text(text)
        assert not ProcessReader(proc.root).read(535).is_visible
    proc.add(536)
    (proc.root / "536/status").write_text("Uid:\nNSpid:\n")
    assert ProcessReader(proc.root).read(536).user is None


def test_a_name_with_brackets_and_controls_is_read(proc: FakeProc) -> None:
    proc.add(535, name="a) Z 1\x1b[31m (b", state="Z")

    assert ProcessReader(proc.root).read(535).command == "a) Z 1?[31m (b (zombie)"


@pytest.mark.parametrize(
    ("cgroup", "container_id"),
    [
        (f"0::/system.slice/docker-{ID}.scope\n", ID[:12]),
        (f"12:memory:/docker/{ID}\n11:cpu:/docker/{ID}\n", ID[:12]),
        (f"0::/user.slice/user-1000.slice/libpod-{ID}.scope/container\n", ID[:12]),
        (f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n", ID[:12]),
        (f"0::/kubepods.slice/kubepods-burstable.slice/crio-{ID}.scope\n", ID[:12]),
        (f"1:cpu:/kubepods/besteffort/pod01234567-89ab/{ID}\n", ID[:12]),
        ("0::/lxc.payload.box-1/init.scope\n", "box-1"),
        ("1:cpu:/lxc/box-1\n", "box-1"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", None),
        (f"0::/build/{ID}\n", None),
        ("0::/\n", None),
    ],
)
def test_a_container_is_known_by_its_cgroup(proc: FakeProc, cgroup: str, container_id: str | None) -> None:
    proc.add(535, cgroup=cgroup)

    assert ProcessReader(proc.root).read(535).container_id == container_id


@pytest.mark.parametrize(("ns_pids", "inner"), [("535", None), ("535\t7", 7), ("535\t70\t7", 7)])
def test_its_pid_in_the_container(proc: FakeProc, ns_pids: str, inner: int | None) -> None:
    proc.add(535, ns_pids=ns_pids)

    assert ProcessReader(proc.root).read(535).container_pid == inner


@pytest.mark.parametrize(
    ("opened", "is_visible"),
    [
        (("/dev/null", "/dev/nvidiactl"), True),
        (("/dev/nvidia0",), True),
        (("/dev/dxg",), True),
        (("/dev/null", "/home/nvidia0"), False),
        ((), False),
    ],
)
def test_in_a_container_a_number_is_the_same_process_only_if_it_has_a_gpu_open(
    inner_proc: FakeProc, opened: tuple[str, ...], is_visible: bool
) -> None:
    inner_proc.add(535, opened=opened)

    facts = ProcessReader(inner_proc.root).read(535)

    assert facts.is_visible == is_visible
    assert (facts.command, facts.user) == (("python3 x.py", "4000000") if is_visible else (None, None))


def test_a_process_that_opens_the_gpu_later_is_seen_then(inner_proc: FakeProc) -> None:
    folder = inner_proc.add(535)
    reader = ProcessReader(inner_proc.root)
    assert not reader.read(535).is_visible

    (folder / "fd/5").symlink_to("/dev/nvidia0")
    assert reader.read(535).is_visible


def test_a_proc_that_can_not_be_read_hides_all(tmp_path: Path) -> None:
    assert not ProcessReader(tmp_path / "none").read(1).is_visible


def test_what_was_found_out_once_is_kept_while_the_process_lives(proc: FakeProc) -> None:
    folder = proc.add(535)
    reader = ProcessReader(proc.root)
    first = reader.read(535)
    for name in ("cmdline", "status", "cgroup"):
        (folder / name).unlink()

    proc_state = (folder / "stat").read_text()
    (folder / "stat").write_text(proc_state.replace(" S ", " R "))
    assert reader.read(535) is first

    proc.add(535, start_time=200, arguments=("other",))  # another process has the number
    assert reader.read(535).command == "other"
    proc.add(535, start_time=200, name="then", arguments=("then",))  # it began another program
    assert reader.read(535).command == "then"


def test_processes_that_no_gpu_lists_any_more_are_forgotten(proc: FakeProc) -> None:
    folder = proc.add(535)
    proc.add(536)
    reader = ProcessReader(proc.root)
    reader.read(535)
    reader.read(536)
    reader.forget_others()
    (folder / "cmdline").unlink()

    reader.read(536)
    reader.forget_others()
    assert reader.read(535).command is None  # read anew


def test_a_secret_that_a_limit_cuts_in_two_is_not_shown(proc: FakeProc) -> None:
    proc.add(535, arguments=("python3", "hf_" + "a" * 20_000))

    assert ProcessReader(proc.root).read(535).command == "python3 …"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    (process,) = start_processes(1)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def test_a_real_process_from_its_start_to_its_end(child: subprocess.Popen[bytes], tmp_path: Path) -> None:
    proc = tmp_path / "proc"  # the namespace of the tests may be any; the rest is the real one
    (proc / "self/ns").mkdir(parents=True)
    (proc / "self/ns/pid").symlink_to(INITIAL)
    (proc / str(child.pid)).symlink_to(f"/proc/{child.pid}")
    reader = ProcessReader(proc)

    facts = reader.read(child.pid)
    assert facts.command == "python3 -c read _ train.py --hub-token *** --rank 0"
    assert SECRET not in str(facts)
    assert facts.user == pwd.getpwuid(os.geteuid()).pw_name

    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert (reader.read(child.pid).command or "").endswith(" (zombie)")
    child.wait()
    assert not reader.read(child.pid).is_visible
