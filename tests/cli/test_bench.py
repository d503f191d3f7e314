"""`dsft bench` at the command line, with a stand-in for the measuring: rows, outputs, files and exit codes."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from dsft.bench.figures import StepFigures, measure_speed
from dsft.bench.options import BenchOptions, BenchSink, Progress
from dsft.bench.result import BenchResult, DeviceFigures, RowResult
from dsft.bench.rows import BenchRow
from dsft.cli.app import main
from dsft.cli.errors import Terminated
from dsft.core.errors import ExitCode

ROW = RowResult("one", {}, "done", ExitCode.DONE, speed=measure_speed([StepFigures(1.0, 100, 50, 100, 1)]))


def make_result(*rows: RowResult, num_rows: int = 1) -> BenchResult:
    return BenchResult(DeviceFigures("CPU"), {}, 3, 1, rows, num_rows)


class FakeBench:
    """Takes the place of `dsft.bench.run`; keeps what it was called with."""

    def __init__(self) -> None:
        self.rows: list[BenchRow] = []
        self.options = BenchOptions()
        self.has_gpu = False
        self.behave: Callable[[BenchSink], None] = lambda sink: sink.on_result(make_result(ROW))

    def run_bench(self, rows: list[BenchRow], options: BenchOptions, sink: BenchSink) -> None:
        self.rows, self.options = rows, options
        sink.on_progress(Progress(1, len(rows), rows[0].name, "measure", 1, 2))
        self.behave(sink)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeBench:
    fake = FakeBench()
    module = ModuleType("dsft.bench.run")
    vars(module).update(run_bench=fake.run_bench, find_gpu=lambda: fake.has_gpu)
    monkeypatch.setitem(sys.modules, "dsft.bench.run", module)
    monkeypatch.chdir(tmp_path)
    return fake


def test_without_a_gpu_the_tiny_preset_is_measured_and_said_so(bench: FakeBench, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench"]) == 0
    assert [row.name for row in bench.rows] == ["tiny"]
    assert "Without a GPU there is the tiny preset to measure, on the CPU." in capsys.readouterr().err


def test_with_a_gpu_its_presets_are_measured(bench: FakeBench) -> None:
    bench.has_gpu = True
    assert main(["bench", "--vram", "24", "--quiet"]) == 0
    assert [(row.name, row.config.vram) for row in bench.rows] == [
        ("conservative", 24), ("balanced", 24), ("quality", 24)
    ]  # fmt: skip
    assert main(["bench", "--device", "cpu", "--quiet"]) == 0
    assert [row.name for row in bench.rows] == ["tiny"]


def test_options_reach_the_bench(bench: FakeBench) -> None:
    options = "--steps 4 --warmup-steps 1 --ceiling-seconds 0 --no-profile --baseline plain --random-data"
    assert main(["bench", "--preset", "tiny", "--lora-r", "8", "--quiet", *options.split()]) == 0
    assert bench.rows[0].config.lora_r == 8
    assert bench.options == BenchOptions(4, 1, 0.0, is_profiled=False, has_baseline=True, use_random=True)


def test_a_grid_is_profiled_only_where_it_is_asked_for(bench: FakeBench, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("- {preset: tiny}\n- {preset: tiny, lora_r: 8}\n", encoding="utf-8")
    assert main(["bench", "--grid", "grid.yaml", "--quiet"]) == 0
    assert len(bench.rows) == 2
    assert not bench.options.is_profiled
    assert main(["bench", "--grid", "grid.yaml", "--profile", "--quiet"]) == 0
    assert bench.options.is_profiled
    assert main(["bench", "--preset", "tiny", "--quiet"]) == 0
    assert bench.options.is_profiled


def test_json_is_one_object(bench: FakeBench, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record == json.loads(json.dumps(asdict(make_result(ROW))))
    assert captured.err == ""


def test_the_file_holds_what_json_shows(bench: FakeBench, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--json", "--output", "out.json"]) == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == json.loads(capsys.readouterr().out)


def test_an_earlier_result_is_compared(bench: FakeBench, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--output", "old.json", "--quiet"]) == 0
    capsys.readouterr()
    faster = RowResult("one", {}, "done", ExitCode.DONE, speed=measure_speed([StepFigures(0.5, 100, 50, 100, 1)]))
    bench.behave = lambda sink: sink.on_result(make_result(faster))
    assert main(["bench", "--compare", "old.json", "--json"]) == 0
    [ratio] = json.loads(capsys.readouterr().out)["comparisons"]
    assert (ratio["name"], ratio["tok_per_s"], ratio["step_s"]) == ("one", 2.0, 0.5)


def test_markdown_goes_to_stdout_even_quietly(bench: FakeBench, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--markdown", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "| one |" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("code", [1, 2, 3, 5])
def test_a_bench_without_any_measured_row_ends_with_its_code(bench: FakeBench, code: int, capsys) -> None:
    row = RowResult("one", {}, "failed", ExitCode(code), reason="because")
    bench.behave = lambda sink: sink.on_result(make_result(row))
    assert main(["bench", "--preset", "tiny"]) == code
    assert "one: because" in capsys.readouterr().out


def test_the_table_is_the_data_and_quietly_all_there_is(bench: FakeBench, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench"]) == 0
    table = capsys.readouterr().out
    assert "one" in table
    assert main(["bench", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (table, "")


def test_a_file_that_can_not_be_written_later_is_warned_of_and_the_table_is_shown(
    bench: FakeBench, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()

    def behave(sink: BenchSink) -> None:
        folder.rmdir()
        sink.on_result(make_result(ROW))
        sink.on_result(make_result(ROW))

    bench.behave = behave
    assert main(["bench", "--preset", "tiny", "--output", "out/x.json", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert "one" in captured.out
    assert captured.err == "warning: --output: out/x.json can't be written: No such file or directory.\n"


def test_a_file_that_can_be_written_again_holds_the_result(bench: FakeBench, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()

    def behave(sink: BenchSink) -> None:
        folder.rmdir()
        sink.on_result(make_result())
        folder.mkdir()
        sink.on_result(make_result(ROW))

    bench.behave = behave
    assert main(["bench", "--preset", "tiny", "--output", "out/x.json", "--quiet"]) == 0
    assert len(json.loads((folder / "x.json").read_text(encoding="utf-8"))["rows"]) == 1


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated("SIGTERM"), 143)])
def test_a_stopped_bench_shows_the_rows_it_has(bench: FakeBench, stop, code: int, capsys, tmp_path: Path) -> None:
    def behave(sink: BenchSink) -> None:
        sink.on_result(make_result(ROW, num_rows=3))
        raise stop

    bench.behave = behave
    assert main(["bench", "--preset", "tiny", "--output", "out.json"]) == code
    captured = capsys.readouterr()
    assert "1 of 3 rows" in captured.out
    assert "Stopped by SIG" in captured.err
    assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]) == 1


def test_stopped_before_the_first_row_there_is_nothing_to_show(bench: FakeBench, capsys) -> None:
    def behave(_sink: BenchSink) -> None:
        raise KeyboardInterrupt

    bench.behave = behave
    assert main(["bench", "--preset", "tiny", "--json"]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--lora-r", "0"], "--lora-r is 0"),
        (["--grid", "none.yaml"], "can't read the grid"),
        (["--compare", "none.json"], "--compare: none.json can't be read"),
        (["--compare", "broken.json"], "--compare: broken.json: speed holds no figures in the row 'tiny'"),
        (["--output", "."], "--output: . is a folder"),
        (["--markdown", "--json"], "--markdown and --json both"),
        (["--output", "nowhere/out.json"], "there is no folder nowhere"),
        (["--steps", "0"], "--steps"),
        (["--steps", "10001"], "--steps"),
        (["--warmup-steps", "10001"], "--warmup-steps"),
        (["--baseline", "other"], "--baseline"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    bench: FakeBench, tmp_path: Path, args: list[str], words: str, capsys
) -> None:
    (tmp_path / "broken.json").write_text('{"format": 1, "rows": [{"name": "tiny", "speed": 5}]}', encoding="utf-8")
    assert main(["bench", *args]) == 2
    assert words in capsys.readouterr().err
    assert bench.rows == []
