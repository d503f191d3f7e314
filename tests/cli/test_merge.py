"""`dsft merge` at the command line: what it asks for, and what it writes where, with a stand-in for the merge."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pexpect
import pytest

from dsft.cli.app import main
from dsft.core.errors import ModelError
from dsft.merge.config import MergeConfig
from dsft.merge.events import EventSink, Notice, Progress
from dsft.merge.result import MergeResult
from tests.merge_results import make_merge_result

Capture = pytest.CaptureFixture[str]

EVERY_OPTION = """
    ./a --output out/x --base b/c --dtype float16 --base_rounding nf4 --device cuda --no_verify --gguf q8_0
    --overwrite --force
"""


class FakeMerge:
    """Takes the place of `dsft.merge.run`; keeps what it was called with."""

    def __init__(self) -> None:
        self.config: MergeConfig | None = None
        self.tell: Callable[[EventSink], None] = lambda sink: None
        self.result = make_merge_result()

    def run_merge(self, config: MergeConfig, sink: EventSink, on_complete: Callable[[Path], None]) -> MergeResult:
        self.config = config
        self.tell(sink)
        on_complete(Path("merged"))
        return self.result


@pytest.fixture
def fake_merge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeMerge:
    fake, module = FakeMerge(), ModuleType("dsft.merge.run")
    vars(module).update(run_merge=fake.run_merge)
    monkeypatch.setitem(sys.modules, "dsft.merge.run", module)
    monkeypatch.chdir(tmp_path)
    return fake


def tell_a_merge(sink: EventSink) -> None:
    sink(Notice("the newest run is trained_deepseek"))
    for done in range(0, 1001, 100):
        sink(Progress("merge", done, 1000))
    sink(Notice("little of the update is left", "warning"))
    for done in (0, 200, 1000):
        sink(Progress("verify", done, 1000))


@pytest.mark.usefixtures("fake_merge")
def test_without_options_the_defaults_are_the_configuration_s(fake_merge: FakeMerge) -> None:
    assert main(["merge", "--quiet"]) == 0
    assert fake_merge.config == MergeConfig()


def test_every_option_reaches_the_merge_in_both_spellings(fake_merge: FakeMerge) -> None:
    expected = MergeConfig(
        adapter="./a",
        output=Path("out/x"),
        base="b/c",
        dtype="float16",
        base_rounding="nf4",
        device="cuda",
        is_verifying=False,
        gguf="q8_0",
        overwrite=True,
        force=True,
    )
    words = EVERY_OPTION.split()
    assert main(["merge", *words, "--quiet"]) == 0
    assert fake_merge.config == expected
    assert main(["merge", *(word.replace("base_r", "base-r").replace("no_v", "no-v") for word in words)]) == 0
    assert fake_merge.config == expected


@pytest.mark.parametrize(
    "option", [["--dtype", "fp8"], ["--gguf", "q4"], ["--base-rounding", "int8"], ["--device", "tpu"], ["a", "b"]]
)
def test_what_there_is_not_is_refused_before_anything_runs(
    fake_merge: FakeMerge, capsys: Capture, option: list[str]
) -> None:
    assert main(["merge", *option]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert option[1] in captured.err
    assert "`dsft merge --help`" in captured.err
    assert fake_merge.config is None


def test_people_get_the_summary_on_stdout_and_lines_on_stderr(fake_merge: FakeMerge, capsys: Capture) -> None:
    fake_merge.tell = tell_a_merge
    assert main(["merge", "./trained_deepseek"]) == 0
    captured = capsys.readouterr()
    assert "✓ trained_deepseek/merged_model is written" in captured.out
    assert "\x1b" not in captured.out + captured.err
    words = [line.split("  ")[0] for line in captured.err.splitlines()]
    assert words == [
        "note: the newest run is trained_deepseek",
        "merging 0.0 MiB ...",
        "merging 0.0 of 0.0 MiB",
        "warning: little of the update is left",
        "verifying 0.0 MiB ...",
        "verifying 0.0 of 0.0 MiB",
    ]


def test_json_is_one_object_a_line_thinned_and_the_result_comes_last(fake_merge: FakeMerge, capsys: Capture) -> None:
    fake_merge.tell = tell_a_merge
    assert main(["merge", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert records[0] == {"event": "Notice", "text": "the newest run is trained_deepseek", "level": "note"}
    assert records[1] == {"event": "Progress", "phase": "merge", "done_bytes": 0, "total_bytes": 1000}
    progress = [(record["phase"], record["done_bytes"]) for record in records if record["event"] == "Progress"]
    assert progress == [("merge", 0), ("merge", 1000), ("verify", 0), ("verify", 1000)]
    result = records[-1]
    assert result["event"] == "MergeResult"
    assert result["output"] == "trained_deepseek/merged_model"
    assert result["verification"]["num_tokens"] == 512
    assert len(result["shards"]) == 3


def test_json_tells_how_far_a_merge_came_that_failed(fake_merge: FakeMerge, capsys: Capture) -> None:
    def fail(sink: EventSink) -> None:
        sink(Progress("merge", 0, 1000))
        sink(Progress("merge", 300, 1000))
        raise ModelError("The adapter holds a NaN.", "Train again.")

    fake_merge.tell = fail
    assert main(["merge", "--json"]) == 2
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.get("done_bytes") for record in records[:2]] == [0, 300]
    assert records[2]["error"]["found"] == "The adapter holds a NaN."
    assert len(records) == 3


def test_quiet_tells_warnings_alone(fake_merge: FakeMerge, capsys: Capture) -> None:
    fake_merge.tell = tell_a_merge
    assert main(["merge", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "warning: little of the update is left\n")


MERGE_IN_A_PROCESS = """
import sys, time, types
from dsft.merge.events import Progress
from tests.merge_results import make_merge_result
def run_merge(config, sink, on_complete):
    sink(Progress("merge", 0, 4 * 2**30))
    for done in range(1, 5):
        time.sleep(0.3)
        sink(Progress("merge", done * 2**30, 4 * 2**30))
    {behaviour}
    return make_merge_result()
run = types.ModuleType("dsft.merge.run")
run.run_merge = run_merge
sys.modules["dsft.merge.run"] = run
from dsft.cli.app import main
sys.exit(main(["merge", *sys.argv[1:]]))
"""

WAIT_FOR_A_SIGNAL = """
    try:
        open("waiting", "w").close()
        time.sleep(60)
    except BaseException as stop:
        stop.add_note("./out is as it was.")
        raise
"""


def test_a_terminal_gets_a_bar_in_bytes_that_makes_room_for_the_summary(repository: Path) -> None:
    terminal = pexpect.spawn(
        sys.executable,
        ["-c", MERGE_IN_A_PROCESS.replace("{behaviour}", "")],
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 90),
        env={"TERM": "xterm-256color", "PATH": "", "PYTHONPATH": str(repository), "LANG": "C.UTF-8"},
    )
    terminal.expect(r"merging .*━.* of 4\.0 GiB.*GB/s.* left")
    terminal.expect("\x1b\\[\\?25h")  # the cursor is back
    terminal.expect("is written")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_a_signal_after_the_model_is_in_its_place_is_told_so(
    fake_merge: FakeMerge, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(result: MergeResult) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsft.cli.views.merge.render_merge", stop)
    assert main(["merge", "./a"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "hint: merged was complete by then; it holds the new model."
    fake_merge.tell = lambda sink: stop(fake_merge.result)
    assert main(["merge", "./a"]) == 130
    assert "hint" not in capsys.readouterr().err


@pytest.mark.parametrize(("signal_name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_with_its_code_and_what_the_merge_says_of_it(
    repository: Path, tmp_path: Path, signal_name: str, code: int
) -> None:
    import signal

    script = MERGE_IN_A_PROCESS.replace("    {behaviour}\n", WAIT_FOR_A_SIGNAL)
    command = [sys.executable, "-c", script, "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while '"done_bytes": 4294967296' not in process.stdout.readline():
            assert process.poll() is None
        while not (tmp_path / "waiting").exists():  # it has told that before it waits
            assert process.poll() is None
        process.send_signal(getattr(signal, signal_name))
        error = process.stderr.read()
        rest = process.stdout.read()
    assert process.returncode == code
    assert error.splitlines() == [f"stopped: {signal_name}; nothing more was saved.", "hint: ./out is as it was."]
    assert json.loads(rest)["error"]["exit_code"] == code


@pytest.mark.parametrize(("mode", "closed"), [("--json", "stdout"), ("--quiet", "stderr"), (None, "stderr")])
def test_a_merge_goes_on_to_its_end_without_its_reader(tmp_path: Path, mode: str | None, closed: str) -> None:
    behaviour = """from pathlib import Path
    from dsft.merge.events import Notice
    sys.stdin.read()  # until the test has closed what it closes
    for _ in range(100):
        sink(Notice("x" * 5000, "warning"))
    Path("merged").touch()"""
    script = MERGE_IN_A_PROCESS.replace("{behaviour}", behaviour)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(
        [sys.executable, "-c", script, *filter(None, [mode])], cwd=tmp_path, text=True, **pipes
    ) as run:  # type: ignore[call-overload]
        lost = run.stdout if closed == "stdout" else run.stderr
        lost.close()
        run.stdin.close()
        assert run.wait(timeout=60) == 0
    assert (tmp_path / "merged").exists()
