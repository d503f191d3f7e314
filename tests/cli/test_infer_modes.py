"""`dsft infer` and its ways to ask: which options go together, comparison, code alone, and every way to end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from dsft.cli.app import main
from dsft.cli.errors import Terminated
from dsft.cli.infer_modes import read_prompt, read_text_value
from dsft.core.errors import InputError, ModelError
from dsft.infer.session import Session
from tests.conftest import RunDsft
from tests.scripted_models import make_tokenizer, write_adapter, write_random_model, write_scripted_model

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_scripted_model(folder / "greeting", "Héy 你😀")
    write_scripted_model(folder / "endless", "abc def\n")
    write_adapter(folder / "adapter", folder / "greeting")
    write_random_model(folder / "random")
    write_adapter(folder / "random_adapter", folder / "random")
    write_adapter(folder / "endless_adapter", folder / "endless")
    return folder


@pytest.fixture(autouse=True)
def _quiet_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    # `main` silences libraries before they are imported; here they are already.
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--chat", "--compare"], ["--chat and --compare are different ways to ask."]),
        (["--file", "f", "--fim", "g", "--compare"], ["--compare, --file and --fim are different ways to ask."]),
        (["--fim", "f", "--fim-suffix", "x"], ["--fim takes the text around the gap from its file, but --fim-suffix"]),
        (["x", "--chat"], ["A prompt was given, but --chat takes none."]),
        (["-", "--file", "f"], ["A prompt was given, but --file takes none."]),
        (["x", "--fim-prefix", "f"], ["A prompt was given, but --fim-prefix takes none."]),
        (["x", "--in-place"], ["--in-place writes into the file of --fim, and there is none."]),
        (["--fim-prefix", "x", "--in-place"], ["--in-place writes into the file of --fim, and there is none."]),
        (["x", "--output", "f", "--batch-size", "2"], ["--output belongs to --file", "--batch-size belongs to --file"]),
        (["--chat", "--code"], ["--code prints the code of a single answer, so it does not go with --chat."]),
        (["x", "--compare", "--code"], ["so it does not go with --compare."]),
        (["--chat", "--json"], ["--json is for programs, but --chat for people."]),
        (["--file", "f", "--speculate"], ["--speculate speeds up one answer at a time"]),
        (
            ["--fim", "f", "--system", "s", "--raw", "--template", "chat"],
            [
                "--fim has no place for the text of --system.",
                "but --raw asks for none",
                "but --template chat was given",
            ],
        ),
    ],
)
def test_options_that_contradict_are_refused_together(
    capsys: pytest.CaptureFixture[str], arguments: list[str], messages: list[str]
) -> None:
    assert main(["infer", *arguments]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert all(message in error for message in messages)
    assert error.startswith("error: ")
    assert "dsft infer --help" in hint


def test_a_number_out_of_range_is_not_told_to_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "--file", "f", "--batch-size", "0"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: --batch-size is 0, but must be at least 1."
    assert "lists what each option takes" in hint


def test_options_are_refused_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from dsft.cli.app import main; code = main(['infer', 'x', '--chat']);"
        "print(code, [name for name in ('torch', 'transformers', 'pygments') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "2 []\n"


@pytest.mark.parametrize(
    ("value", "text"), [(None, None), ("", ""), ("a@b", "a@b"), ("@@dec", "@dec"), ("@@@x", "@@x"), ("@f.py", "é\r\n")]
)
def test_a_text_option_is_a_text_or_a_file(tmp_path: Path, value: str | None, text: str | None) -> None:
    (tmp_path / "f.py").write_bytes("é\r\n".encode())
    assert read_text_value(value, "--fim-prefix") == text


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("@/dev/zero", "larger than 16 MiB"),
        ("@nowhere", "No such file"),
        ("@", "directory"),
        ("@bad", "UTF-8 at byte 2"),
        ("@a\0", "null"),
    ],
)
def test_a_file_of_a_text_option_that_can_not_be_read_is_named(tmp_path: Path, value: str, found: str) -> None:
    (tmp_path / "bad").write_bytes(b"a\xff")
    with pytest.raises(InputError) as caught:
        read_text_value(value, "--fim-prefix")
    assert "--fim-prefix" in caught.value.found
    assert found in caught.value.found


def test_code_of_an_answer_without_a_block_is_the_answer(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["infer", "x", "--model", str(models / "greeting"), *CPU, "--code"]
    assert main([*given, "--quiet"]) == 0
    assert capsys.readouterr() == ("Héy 你😀\n", "")
    assert main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["code"]) == ("Héy 你😀", "Héy 你😀")


def test_drafts_are_counted_and_leave_the_answer_as_it_is(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["infer", "x", "--model", str(models / "endless"), *CPU, "--max-new-tokens", "40"]
    main(given)
    plain = capsys.readouterr().out
    assert main([*given, "--speculate"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain
    assert "drafted tokens taken; " in drafted.err
    main([*given, "--speculate", "--json"])
    told = json.loads(capsys.readouterr().out)["speculation"]
    assert told["num_drafted"] >= told["num_accepted"] > 0


def test_a_comparison_asks_the_base_alone_and_with_the_adapter(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*arguments: str) -> dict[str, Any]:
        assert main(["infer", "Say it.", *CPU, "--max-new-tokens", "20", "--json", *arguments]) == 0
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return told

    adapter = str(models / "random_adapter")
    told = ask("--compare", "--model", adapter)
    assert told["base"]["text"] == ask("--model", str(models / "random"))["text"]
    assert told["adapter"]["text"] == ask("--model", adapter)["text"] != told["base"]["text"]
    assert told["base"]["template"] == told["adapter"]["template"] == "instruction"


def test_a_comparison_is_told_in_sections(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "x", "--model", str(models / "adapter"), *CPU, "--max-new-tokens", "20", "--compare"]) == 0
    captured = capsys.readouterr()
    assert captured.out == (
        f"=== Base alone: {models / 'greeting'} ===\nHéy 你😀\n\n=== With adapter: {models / 'adapter'} ===\nHéy 你😀\n"
    )
    notes = captured.err.splitlines()
    assert notes[:2] == ["Base alone is answering.", "With adapter is answering."]
    assert notes[2].startswith("Base alone: 13 tokens, ended by itself; ")
    assert notes[3].startswith("With adapter: 13 tokens, ended by itself; ")
    assert "tok/s" in notes[2] and "tok/s" in notes[3]
    assert notes[4:] == ["Both answers are the same."]


def test_both_sides_of_a_comparison_draw_with_the_same_seed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["infer", "x", "--model", str(models / "adapter"), *CPU, "--max-new-tokens", "3", "--temperature", "2"]
    assert main([*given, "--compare", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"]["seed"] == told["adapter"]["seed"] is not None


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (Terminated("SIGTERM"), 143), (ModelError("NaN."), 2)]
)
@pytest.mark.parametrize("said", ["", "Hal"])
def test_what_a_comparison_has_is_written_when_it_breaks_off(
    models: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    error: BaseException,
    code: int,
) -> None:
    answer = Session.answer

    def break_off(self: Session, prompt: Any, on_text: Callable[[str], None], *, use_adapter: bool = True) -> Any:
        if not use_adapter:
            return answer(self, prompt, on_text, use_adapter=False)
        if said:
            on_text(said)
        raise error

    monkeypatch.setattr(Session, "answer", break_off)
    given = ["infer", "x", "--model", str(models / "adapter"), *CPU, "--max-new-tokens", "20", "--compare"]
    assert main(given) == code
    base = f"=== Base alone: {models / 'greeting'} ===\nHéy 你😀\n"
    adapter = f"\n=== With adapter: {models / 'adapter'} ===\n{said}\n" if said else ""
    assert capsys.readouterr().out == base + adapter
    assert main([*given, "--json"]) == code
    assert list(json.loads(capsys.readouterr().out)) == ["error"]


def test_a_comparison_tells_of_a_limit_once(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "x", "--model", str(models / "adapter"), *CPU, "--max-new-tokens", "9999", "--compare"]) == 0
    assert capsys.readouterr().err.count(" new tokens: no more fit into the model's context beside the prompt.") == 1


def test_a_whole_model_has_nothing_to_be_compared_with(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "x", "--compare", "--model", str(models / "greeting"), *CPU]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--compare needs an adapter, and " in captured.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("arguments", "awaited", "written"),
    [
        (["--code", "--model", "endless"], "Template: ", ""),  # told just before the model is loaded
        (["--compare", "--model", "endless_adapter"], "Base alone is answering.", "=== Base alone: {base} ===\na"),
    ],
)
def test_a_signal_ends_every_mode_quietly(
    models: Path, arguments: list[str], awaited: str, written: str, number: signal.Signals, code: int
) -> None:
    *options, model = arguments
    command = [sys.executable, "-m", "dsft", "infer", "go", "--max-new-tokens", "4000", *CPU, *options]
    with subprocess.Popen(
        [*command, str(models / model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        first = process.stderr.readline()
        process.send_signal(number)
        assert first.startswith(awaited)
        text, told = process.stdout.read(), process.stderr.read()
    begin = written.format(base=models / "endless")
    assert (text[: len(begin) or None], told) == (begin, "")
    assert process.returncode == code


def test_head_ends_a_comparison_quietly(models: Path) -> None:
    command = (
        f'"{sys.executable}" -m dsft infer x --compare --model "{models / "adapter"}" --device cpu --quiet '
        "--max-new-tokens 20; echo $? >&2"
    )
    done = subprocess.run(
        ["sh", "-c", f"({command}) | head -1"], capture_output=True, text=True, timeout=120, check=False, env=os.environ
    )
    assert done.stdout == f"=== Base alone: {models / 'greeting'} ===\n"
    assert done.stderr == "0\n"


@pytest.mark.parametrize("arguments", [["hello", "world"], ["hello", "big", "world", "--quiet"]])
def test_a_prompt_without_quotes_is_told_of_them(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["infer", *arguments]) == 2
    assert '\nhint: A prompt of several words needs quotes: `dsft infer "PROMPT"`.' in capsys.readouterr().err
    assert main(["train", *arguments]) == 2
    assert "quotes" not in capsys.readouterr().err


SPOKEN = "Here:\n```python\nx = 1\n```\nAnd in C:\n```c\nint x = 1;\n```\n"


@pytest.mark.parametrize("options", [[], ["--speculate"]])
def test_code_alone_is_generated_up_to_the_end_of_its_block(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    from dsft.infer.decoding.loop import Speculation

    token_ids = make_tokenizer()(SPOKEN)["input_ids"]

    def say_each(*given: Any) -> None:
        any(given[-1](0, token_id) for token_id in token_ids)

    def say_in_drafts(*given: Any) -> Speculation:
        any(given[-1](token_id) for token_id in token_ids)
        return Speculation(0, 0, 0)

    monkeypatch.setattr("dsft.infer.decoding.loop.generate", say_each)
    monkeypatch.setattr("dsft.infer.decoding.loop.generate_with_drafts", say_in_drafts)
    given = ["infer", "x", "--model", str(models / "greeting"), *CPU, *options]
    seen = SPOKEN[: SPOKEN.index("And")]
    assert main([*given, "--code"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "x = 1\n"
    assert f"\n{len(seen)} tokens, ended where the code block does; first token" in captured.err
    assert main([*given, "--code", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["text"], told["code"], told["stop_reason"]) == (seen, "x = 1\n", "code_complete")
    assert main([*given, "--quiet"]) == 0
    assert capsys.readouterr().out == SPOKEN  # without --code all of it


UNREAD = (
    "stdin was not read, because the prompt was given as the argument. To ask with both: "
    'dsft infer "PROMPT $(cat FILE)"'
)


@pytest.mark.parametrize(
    ("redirection", "told"),
    [
        ("< list.txt", [UNREAD]),
        ("< empty.txt", []),
        ("< /dev/null", []),
        ("<&-", []),
    ],
)
def test_text_on_stdin_beside_a_prompt_is_told_of(
    models: Path, tmp_path: Path, redirection: str, told: list[str]
) -> None:
    (tmp_path / "list.txt").write_text("one\ntwo\n")
    (tmp_path / "empty.txt").touch()
    dsft = f'"{sys.executable}" -m dsft infer x --model "{models / "greeting"}" --template instruction {" ".join(CPU)}'
    done = subprocess.run(
        ["sh", "-c", f"({dsft}; cat) {redirection}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "Héy 你😀\n" + ("one\ntwo\n" if told else "")  # what was not read is still there
    assert [line for line in done.stderr.splitlines() if line.startswith("stdin")] == told


def test_a_pipe_is_not_waited_for_where_a_prompt_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    notices: list[str] = []
    with os.fdopen(read_end) as stdin, os.fdopen(write_end, "w") as writer:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompt("x", is_raw=False, on_notice=notices.append) == "x"  # nothing has come yet
        assert notices == []
        writer.write("code")
        writer.flush()
        assert read_prompt("x", is_raw=False, on_notice=notices.append) == "x"
        assert notices == [UNREAD]
        writer.close()
        assert read_prompt("-", is_raw=False, on_notice=notices.append) == "code"
        assert read_prompt("x", is_raw=False, on_notice=notices.append) == "x"  # a pipe at its end
    assert notices == [UNREAD]


@pytest.mark.parametrize("width", ["80", "120"])
def test_the_help_page_lists_each_mode_in_whole_lines(run_dsft: RunDsft, width: str) -> None:
    done = run_dsft("infer", "--help", env=os.environ | {"COLUMNS": width})
    assert all(len(line.rstrip()) <= int(width) for line in done.stdout.splitlines())
    flags = (
        "--chat --compare --file --output --batch-size --fim --in-place --fim-prefix --fim-suffix --code --speculate"
    )
    words = done.stdout.split()
    assert [flag for flag in flags.split() if flag not in words] == []


def test_the_help_page_promises_what_is_so(run_dsft: RunDsft) -> None:
    done = run_dsft("infer", "--help", env=os.environ | {"COLUMNS": "120"})
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "--output FILE With --file: new JSONL file of the answers;" in words  # one that is there is refused
    assert "but for rounding ties in 16 bits, the answer stays the same" in words
