"""`dsft infer --file` at the command line: answers in order, kept through a kill, and what is told on the way."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.console import Console
from transformers.utils import logging as transformers_logging

from dsft.cli.app import main
from dsft.cli.views.infer_batch import BatchState, advance, describe_batch, format_line, render_state
from dsft.cli.views.infer_batch_live import open_batch_view
from dsft.infer.batch_events import BatchProgress, BatchResult
from tests.scripted_models import write_random_model, write_scripted_model

JOURNAL = Path(".answers.jsonl.partial")
ANSWERS = Path("answers.jsonl")
LONG_ENOUGH = ("--max-new-tokens", "100")  # for 41 rows to be at work for seconds


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_scripted_model(folder / "greeting", "Hé!")
    write_scripted_model(folder / "endless", "abc\n")
    write_random_model(folder / "random")
    return folder


@pytest.fixture(autouse=True)
def _quiet_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transformers_logging.disable_progress_bar()


def write_rows(*rows: Any) -> None:
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def give_options(models: Path, name: str, *more: str) -> list[str]:
    return ["infer", "--file", "rows.jsonl", "--model", str(models / name), "--device", "cpu", *more]


def test_answers_stand_in_the_file_and_the_rest_on_stderr(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows({"prompt": "a", "id": "x"}, {"prompt": "bcd"})
    assert main(give_options(models, "greeting", "--output", "answers.jsonl")) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    template, summary = captured.err.splitlines()
    assert template.startswith("Template: instruction")
    assert summary.startswith("2 rows; 10 tokens in ") and summary.endswith(" tok/s; answers in answers.jsonl")
    first, second = ANSWERS.read_text(encoding="utf-8").splitlines()
    assert first.startswith('{"line": 1, "id": "x", "text": "Hé!", "stop_reason": "end_token", "num_prompt_tokens": ')
    assert json.loads(second)["line"] == 2
    assert not JOURNAL.exists()


def test_bad_rows_are_warned_of_and_make_the_exit_code_1(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n\n{"prompt": ""}\n"b"\n')
    assert main(give_options(models, "greeting", "--output", "answers.jsonl", "--quiet")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "warning: rows.jsonl:2: broken JSON: Expecting value (column 12).",
        "warning: rows.jsonl:4: the instruction is empty.",
    ]
    answers = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 4, 5]
    assert answers[1]["error"] == {"kind": "BadRow", "found": "broken JSON: Expecting value (column 12)"}
    assert answers[3]["text"] == "Hé!"


def test_without_an_output_file_stdout_has_the_answers_as_json_lines(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows("a", "bcd", "a")
    assert main(give_options(models, "greeting", "--batch-size", "2")) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(answer["line"], answer["text"]) for answer in answers] == [(1, "Hé!"), (2, "Hé!"), (3, "Hé!")]


def test_json_ends_with_the_figures(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows("a", {})
    assert main(give_options(models, "greeting", "--json")) == 1
    first, second, figures = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["line"], second["line"], second["error"]["kind"]) == (1, 2, "BadRow")
    assert figures.pop("duration_s") > 0 and figures.pop("tok_per_s") > 0
    assert figures == {
        "num_rows": 2,
        "num_answered": 1,
        "num_resumed": 0,
        "num_failed": 1,
        "num_prompt_tokens": len("### Instruction:\na\n\n### Response:\n"),
        "num_new_tokens": 5,
        "output": None,
        "model": str(models / "greeting"),
        "base": None,
        "seed": None,
    }
    assert main(give_options(models, "greeting", "--json", "--output", "answers.jsonl")) == 1
    (only,) = capsys.readouterr().out.splitlines()
    assert json.loads(only)["output"] == "answers.jsonl"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", [], "rows.jsonl holds no prompts"),
        ("[1, 2]\n", [], "has no row that can be asked"),
        (None, [], "rows.jsonl can't be read"),
        ('"a"\n', ["--output", "no/answers.jsonl"], "there is no folder no"),
        ('"a"\n', ["--output", "rows.jsonl"], "rows.jsonl is there already, and is not written over"),
        ('"a"\n', ["--output", "."], ". is a folder"),
        ('"a"\n', ["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_what_can_t_be_done_is_told_and_leaves_nothing(
    models: Path, capsys: pytest.CaptureFixture[str], content: str | None, arguments: list[str], message: str
) -> None:
    if content is not None:
        Path("rows.jsonl").write_text(content)
    assert main(give_options(models, "greeting", *arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert [path.name for path in Path().iterdir()] == ([] if content is None else ["rows.jsonl"])


def test_stdin_and_stdout_are_files_too(models: Path) -> None:
    command = [sys.executable, "-m", "dsft", "infer", "--file", "-", "--output", "-"]
    done = subprocess.run(
        [*command, "--model", str(models / "greeting"), "--device", "cpu", "--quiet"],
        input='{"prompt": "a"}\nbad\n',
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert [json.loads(line).get("text") for line in done.stdout.splitlines()] == ["Hé!", None]
    assert done.stderr.splitlines() == ["warning: -:2: broken JSON: Expecting value (column 1)."]
    assert done.returncode == 1 and not list(Path().iterdir())


def start(models: Path, *more: str) -> "subprocess.Popen[str]":
    options = give_options(models, "random", "--output", "answers.jsonl", *LONG_ENOUGH, *more)
    return subprocess.Popen([sys.executable, "-m", "dsft", *options], stderr=subprocess.PIPE, text=True)


def wait_for_answers(num_answers: int) -> None:
    end_s = time.monotonic() + 60
    while not JOURNAL.exists() or JOURNAL.read_bytes().count(b"\n") <= num_answers:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def write_many_rows() -> int:
    prompts = [f"Prompt {number} {'x' * (number * 7 % 30)}" for number in range(40)]
    write_rows(*({"prompt": prompt, "id": number} for number, prompt in enumerate(prompts)), {"prompt": ""})
    return len(prompts)


def finish(models: Path, *more: str) -> str:
    with start(models, *more) as process:
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == 1, told  # one row is empty
    return told


def test_a_batch_killed_again_and_again_ends_as_one_that_was_left_in_peace(models: Path) -> None:
    write_many_rows()
    finish(models, "--batch-size", "4")
    expected = ANSWERS.read_bytes()
    ANSWERS.unlink()
    for num_answers in (3, 9):
        with start(models, "--batch-size", "2") as process:
            wait_for_answers(num_answers)
            process.kill()
        assert not ANSWERS.exists()
    with JOURNAL.open("ab") as file:
        file.write(b'{"line": 4, "text": "torn')
    told = finish(models, "--batch-size", "4")
    assert "are no whole answer" in told
    assert " rows were answered before; " in told
    assert ANSWERS.read_bytes() == expected
    assert not JOURNAL.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_there_and_says_how_to_go_on(models: Path, number: signal.Signals, code: int) -> None:
    num_rows = write_many_rows() + 1
    with start(models, "--batch-size", "2") as process:
        assert process.stderr is not None
        wait_for_answers(2)
        process.send_signal(number)
        told = process.stderr.read()
    assert process.returncode == code
    num_kept = JOURNAL.read_bytes().count(b"\n") - 1
    assert told.splitlines()[-1] == (
        f"{num_kept} of {num_rows} rows are answered and kept; the same command goes on with the others."
    )


def test_other_settings_and_another_process_do_not_mix_answers(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_many_rows()
    options = give_options(models, "random", "--output", "answers.jsonl")
    with start(models, "--batch-size", "1") as process:
        wait_for_answers(1)
        assert main([*options, *LONG_ENOUGH]) == 2
        assert "Another dsft command is writing answers.jsonl now." in capsys.readouterr().err
        process.kill()
    assert main([*options, "--max-new-tokens", "9"]) == 2
    error = capsys.readouterr().err
    assert "max_new_tokens was 100 and is 9." in error
    assert f"rm {JOURNAL}" in error
    write_rows("another")
    assert main([*options, *LONG_ENOUGH]) == 2
    assert "another version of the prompts" in capsys.readouterr().err


def test_a_closed_pipe_ends_it_quietly(models: Path) -> None:
    write_rows(*(["go"] * 30))
    options = give_options(models, "endless", "--max-new-tokens", "200", "--batch-size", "1", "--quiet")
    command = [sys.executable, "-m", "dsft", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["line"] == 1
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (0, b"")


def test_answers_for_a_file_outlive_the_reader_of_stderr(models: Path) -> None:
    write_rows(*(["go"] * 5), {})
    options = give_options(models, "greeting", "--batch-size", "1", "--output", "answers.jsonl")
    with subprocess.Popen([sys.executable, "-m", "dsft", *options], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
        process.wait()
    assert len(ANSWERS.read_text().splitlines()) == 6


def test_a_terminal_has_a_bar_and_then_the_summary(models: Path) -> None:
    write_rows(*(f"go {number}" for number in range(9)))
    options = give_options(models, "endless", "--max-new-tokens", "500", "--batch-size", "1", "--output", "a.jsonl")
    terminal = pexpect.spawn(
        sys.executable, ["-m", "dsft", *options], encoding="utf-8", timeout=60, dimensions=(24, 100)
    )
    terminal.expect(r"━.*\d of 9 rows, [\d,]+ tok/s, eta ")
    terminal.expect(r"9 rows; 4,500 tokens in .*answers in a\.jsonl")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_a_line_says_how_far_it_is() -> None:
    begun = advance(None, BatchProgress(1200, num_failed=1), 100.0)
    assert format_line(begun, 100.0) == "1 of 1,200 rows, 1 failed"
    later = advance(begun, BatchProgress(1200, 299, 300, 1, 6000), 130.0)
    assert (later.tok_per_s, later.eta_s(130.0), later.eta_s(140.0)) == (200.0, 60.0, 50.0)
    assert format_line(later, 140.0) == "600 of 1,200 rows, 1 failed, 200 tok/s, eta 50 s"
    done = advance(later, BatchProgress(1200, 299, 900, 1, 18000), 190.0)
    assert format_line(done, 190.0) == "1,200 of 1,200 rows, 1 failed, 200 tok/s"


@pytest.mark.parametrize("width", [20, 60, 200])
def test_the_bar_is_one_line_of_any_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    state = BatchState(BatchProgress(1000, 0, 500, 3, 60_000), 0.0, 60.0)
    console.print(render_state(state, width, 60.0))
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(line) <= width
    assert "━" in line


def test_a_pipe_gets_a_line_now_and_then() -> None:
    console, now = Console(file=io.StringIO(), width=100), [0.0]
    with open_batch_view(console, lambda: now[0]) as sink:
        for second in range(31):
            now[0] = float(second)
            sink(BatchProgress(40, 0, second, 0, second * 5))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [f"{second} of 40 rows, 5 tok/s, eta {40 - second} s" for second in (10, 20, 30)]


def test_the_summary_is_one_line() -> None:
    result = BatchResult(9, 8, 3, 1, 50, 1200, 4.0, 300.0, "a.jsonl", "m", None, 7)
    assert describe_batch(result) == (
        "9 rows; 3 of them answered before; 1 failed; 1,200 tokens in 4.0 s, 300 tok/s; seed 7; answers in a.jsonl"
    )
