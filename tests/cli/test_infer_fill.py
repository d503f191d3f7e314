"""`dsft infer --fim` at the command line: the middle to the letter on stdout, and the file written or left alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from transformers.utils import logging as transformers_logging

from dsft.cli.app import main
from tests.fim_models import write_fim_model
from tests.scripted_models import write_scripted_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_fim_model(folder / "lines", "héy\n12")
    write_fim_model(folder / "line", "abc\n")
    write_fim_model(folder / "endless", "abcd\n", is_endless=True)
    write_fim_model(folder / "control", "a\x1b[2Jb")
    return folder


@pytest.fixture(autouse=True)
def _quiet_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transformers_logging.disable_progress_bar()


def give_options(models: Path, name: str) -> list[str]:
    return ["--model", str(models / name), "--device", "cpu"]


def test_stdout_is_the_middle_to_the_letter(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "--fim-prefix", "a", "--fim-suffix", "b", *give_options(models, "lines")]) == 0
    captured = capsys.readouterr()
    assert captured.out == "héy\n12"
    assert captured.err.startswith("8 tokens, ended by itself")  # é is two, and the end token is one


@pytest.mark.parametrize("arguments", [["--fim-prefix", "a"], ["a", "--template", "fim"]])
def test_a_model_without_the_tokens_is_told_with_those_that_have_them(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    write_scripted_model(Path("plain"), "abc")
    assert main(["infer", *arguments, "--model", "./plain", "--device", "cpu"]) == 2
    found, fix = capsys.readouterr().err.splitlines()
    assert found == "error: ./plain has no fill-in-the-middle tokens that are known, so it can't fill a gap."
    assert "DeepSeek-Coder, Qwen2.5-Coder" in fix
    assert "--template text" not in fix


def test_a_terminal_gets_a_line_end(models: Path) -> None:
    arguments = ["-m", "dsft", "infer", "--quiet", "--fim-prefix", "a", *give_options(models, "lines")]
    terminal = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=60)
    terminal.expect(pexpect.EOF)
    assert terminal.before == "héy\r\n12\r\n"


def test_control_characters_reach_pipes_and_files_but_do_not_steer_a_terminal(
    models: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("x.py").write_text("<FILL>3")
    arguments = ["infer", "--quiet", "--fim", "x.py", *give_options(models, "control")]
    terminal = pexpect.spawn(sys.executable, ["-m", "dsft", *arguments], encoding="utf-8", timeout=60)
    terminal.expect(pexpect.EOF)
    assert terminal.before == "a␛[2Jb\r\n"
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes no terminal of a pipe
    assert main([*arguments, "--in-place"]) == 0
    assert capfd.readouterr().out == "a\x1b[2Jb"
    assert Path("x.py").read_text() == "a\x1b[2Jb3"


@pytest.mark.parametrize(("more", "code", "out"), [([], 0, "abc\n"), (["--in-place"], 2, "")])
def test_stdin_is_read_but_not_replaced(models: Path, more: list[str], code: int, out: str) -> None:
    command = [sys.executable, "-m", "dsft", "infer", "--fim", "-", *more, *give_options(models, "line")]
    done = subprocess.run(command, input="1<FILL>3", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, out)
    assert ("- is no regular file" in done.stderr) == bool(more)


def test_in_place_replaces_the_mark_and_says_where(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.py").write_bytes(b"1\r\n2<FILL>3\r\n")
    assert main(["infer", "--fim", "x.py", "--in-place", *give_options(models, "line")]) == 0
    assert Path("x.py").read_bytes() == b"1\r\n2abc\r\n3\r\n"
    assert capsys.readouterr().err.endswith("\nx.py:2: the mark was replaced.\n")


def test_without_in_place_the_file_stays(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.py").write_bytes(b"<FILL>3")
    assert main(["infer", "--fim", "x.py", "--json", *give_options(models, "line")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["file"], told["is_written"]) == ("abc\n", "x.py", False)
    assert told["template"] == "fim"
    assert Path("x.py").read_bytes() == b"<FILL>3"


def test_a_cut_answer_is_on_stdout_and_not_in_the_file(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.py").write_text("<FILL>3")
    options = ["--in-place", "--max-new-tokens", "6", *give_options(models, "endless")]
    assert main(["infer", "--fim", "x.py", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "abcd\na"
    assert "error: The text was not written into x.py: it was cut at --max-new-tokens." in captured.err
    assert Path("x.py").read_text() == "<FILL>3"
    assert main(["infer", "--fim", "x.py", "--json", *options]) == 1
    result, error = map(json.loads, capsys.readouterr().out.splitlines())
    assert (result["text"], result["is_written"]) == ("abcd\na", False)
    assert (error["error"]["kind"], error["error"]["exit_code"]) == ("WriteError", 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_answer_broken_off_leaves_the_file_alone(models: Path, number: signal.Signals, code: int) -> None:
    Path("x.py").write_text("<FILL>3")
    options = ["--in-place", "--max-new-tokens", "4000", *give_options(models, "endless")]
    command = [sys.executable, "-m", "dsft", "infer", "--fim", "x.py", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "abcd\n"
        process.send_signal(number)
        error = process.stderr.read()
        process.stdout.read()
    assert process.returncode == code
    assert error.endswith("x.py is as it was.\n")
    assert Path("x.py").read_text() == "<FILL>3"
    assert [path.name for path in Path().iterdir()] == ["x.py"]


def test_wrong_files_are_told_before_the_model_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.py").write_text("<FILL>\n<FILL>")
    assert main(["infer", "--fim", "x.py", "--model", "./nowhere"]) == 2
    assert "x.py has 2 marks <FILL>, on lines 1, 2." in capsys.readouterr().err


def test_a_closed_pipe_does_not_keep_the_answer_from_the_file(models: Path) -> None:
    Path("x.py").write_text("<FILL>3")
    command = [sys.executable, "-m", "dsft", "infer", "--fim", "x.py", "--in-place", *give_options(models, "line")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.communicate()
    assert process.returncode == 0
    assert Path("x.py").read_text() == "abc\n3"
