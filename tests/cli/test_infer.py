"""`dsft infer` at the command line: the answer alone on stdout, all else on stderr, and every way to end."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from transformers.utils import logging as transformers_logging

from dsft.cli.app import main
from dsft.cli.errors import Terminated
from tests.conftest import RunDsft
from tests.scripted_models import write_adapter, write_scripted_model

ENDLESS = ("infer", "go", "--max-new-tokens", "4000", "--device", "cpu")

EVERY_OPTION = """
    --template instruction --max_new_tokens 4 --temperature 0.5 --top_p 0.9 --top_k 5 --repetition_penalty 1.1 --seed 3
    --stop x --stop y --dtype float32 --load_in_4bit --device cpu
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_scripted_model(folder / "greeting", "Héy 你😀")
    write_scripted_model(folder / "endless", "abc def\n")
    return folder


@pytest.fixture(autouse=True)
def _quiet_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    # `main` silences libraries before they are imported; here they are already.
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_stdout_holds_the_answer_and_stderr_the_rest(models: Path, run_dsft: RunDsft) -> None:
    done = run_dsft("infer", "Say it.", "--model", str(models / "greeting"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Héy 你😀\n"
    template, statistics = done.stderr.splitlines()
    assert template.startswith("Template: instruction")
    assert statistics.startswith("13 tokens, ended by itself; first token after 0.")
    assert "tok/s" in statistics


def test_one_token_is_no_plural(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["infer", "x", "--model", str(models / "greeting"), "--device", "cpu", "--max-new-tokens", "1"])
    assert "\n1 token, cut at --max-new-tokens; first token after " in capsys.readouterr().err


def test_quiet_leaves_the_answer_alone(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "x", "--model", str(models / "greeting"), "--device", "cpu", "--quiet"]) == 0
    assert capsys.readouterr() == ("Héy 你😀\n", "")


def test_json_is_one_object(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(models / "endless")
    assert main(["infer", "x", "--model", path, "--device", "cpu", "--stop", "de", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (line,) = captured.out.splitlines()
    told = json.loads(line)
    assert told.pop("time_to_first_token_s") > 0
    assert told.pop("tok_per_s") > 0
    assert told.pop("load_s") > 0
    assert told.pop("peak_memory_bytes") > 0
    assert told == {
        "text": "abc ",
        "num_prompt_tokens": len("### Instruction:\nx\n\n### Response:\n"),
        "num_new_tokens": 6,
        "stop_reason": "stop_string",
        "speculation": None,
        "model": path,
        "base": None,
        "template": "instruction",
        "seed": None,
        "dtype": "float32",
        "device": "cpu",
    }


@pytest.mark.parametrize(("num_tokens", "expected"), [("16", "abc def\nabc def\n"), ("3", "abc\n")])
def test_the_output_ends_with_one_line_end(
    models: Path, capsys: pytest.CaptureFixture[str], num_tokens: str, expected: str
) -> None:
    main(["infer", "x", "--model", str(models / "endless"), "--device", "cpu", "--max-new-tokens", num_tokens])
    assert capsys.readouterr().out == expected


def test_an_empty_answer_is_an_empty_line(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["infer", "x", "--model", str(models / "greeting"), "--device", "cpu", "--stop", "H"])
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_the_prompt_comes_from_stdin(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    options = ["--model", str(models / "greeting"), "--device", "cpu", "--json"]
    main(["infer", "Grüße", *options])
    written = json.loads(capsys.readouterr().out)
    give_stdin(monkeypatch, "Grüße\n".encode())
    assert main(["infer", *arguments, *options]) == 0
    assert json.loads(capsys.readouterr().out)["num_prompt_tokens"] == written["num_prompt_tokens"]


def test_a_raw_prompt_from_stdin_keeps_its_line_end(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_stdin(monkeypatch, b"x\n")
    main(["infer", "--raw", "--model", str(models / "greeting"), "--device", "cpu", "--quiet"])
    assert capsys.readouterr().out == "Héy 你😀\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "The prompt is empty"), (b" \n", "The prompt is empty"), (b"ab\xff", "not valid UTF-8 at byte 3")],
)
def test_a_prompt_on_stdin_that_is_none_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    give_stdin(monkeypatch, data)
    assert main(["infer"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_terminal_is_not_waited_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b"never read")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["infer"]) == 2
    assert "There is no prompt" in capsys.readouterr().err


def test_both_spellings_and_every_option_parse(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = EVERY_OPTION.split()
    assert main(["infer", "x", "--model", str(models / "endless"), *given]) == 0
    assert capsys.readouterr().err.rstrip().endswith("seed 3")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--model", "./nowhere"], 2, "There is no model folder ./nowhere"),
        ([], 2, "There is no finished run"),
        (["--model", "some/model"], 2, "some/model"),
        (["--temperature", "-1"], 2, "--temperature is -1.0"),
        (["--template", "poem"], 2, "poem"),
        (["--dtype", "int3"], 2, "int3"),
        (["--max-new-tokens", "many"], 2, "--max-new-tokens"),
        (["--device", "cuda", "--model", "{greeting}"], 5, "--device cuda"),
        (["--base", "x", "--model", "{greeting}"], 2, "no adapter folder"),
    ],
)
def test_wrong_input_is_told_with_its_exit_code(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], exit_code: int, message: str
) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    filled = [argument.format(greeting=models / "greeting") for argument in arguments]
    assert main(["infer", "prompt", *filled]) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "hint: " in captured.err
    assert "Traceback" not in captured.err


def test_a_missing_base_is_named(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "trained_x", models / "greeting", base_name="./moved")
    config = tmp_path / "trained_x" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/moved/too"}))
    assert main(["infer", "prompt"]) == 2
    error = capsys.readouterr().err
    assert "./moved or /moved/too, is not there" in error
    assert "--base" in error


def test_text_arrives_in_a_pipe_while_it_is_generated(models: Path) -> None:
    command = [sys.executable, "-m", "dsft", *ENDLESS, "--model", str(models / "endless")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1) == b"a"
        started_s = time.monotonic()
        assert process.poll() is None  # 4000 tokens take longer than the first one
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 143
    assert time.monotonic() - started_s < 10
    assert rest.endswith(b"\n")
    assert set(rest.split(b"\n")[1:-2]) <= {b"abc def"}


def test_ctrl_c_ends_it_quietly(models: Path) -> None:
    arguments = ["-m", "dsft", *ENDLESS, "--model", str(models / "endless"), "--template", "instruction"]
    terminal = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=60)
    terminal.expect("abc def\r\nabc def\r\n")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130
    words = terminal.before.replace("^C", "").split()
    assert set(words) <= {"abc", "def", "a", "ab", "d", "de"}
    assert terminal.before.endswith("\r\n")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated("SIGTERM"), 143)])
def test_json_tells_of_an_answer_that_a_signal_broke_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stop: BaseException, code: int
) -> None:
    def break_off(*_: object, on_text: Callable[[str], None], **__: object) -> None:
        on_text("half an")
        raise stop

    monkeypatch.setattr("dsft.infer.run.run_infer", break_off)
    assert main(["infer", "x", "--json"]) == code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["exit_code"] == code
    assert captured.err == ""


def test_a_closed_pipe_ends_it_quietly(models: Path) -> None:
    command = [sys.executable, "-m", "dsft", *ENDLESS, "--model", str(models / "endless"), "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"abc def\n"
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (0, b"")


@pytest.mark.parametrize("mode", ["--quiet", "--json"])
def test_a_stdout_that_the_shell_has_closed_is_no_error(models: Path, mode: str) -> None:
    options = ["infer", "x", "--model", str(models / "greeting"), "--device", "cpu", mode]
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "dsft", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_choice_is_told_in_plain_words(run_dsft: RunDsft) -> None:
    done = run_dsft("infer", "x", "--template", "nope")
    assert done.returncode == 2
    assert "Value error" not in done.stderr
    assert "'nope' is not one of" in done.stderr
