"""The group: help, version, spellings, wrong commands and options, completion."""

import json
import os
import subprocess
import sys

import pytest

from dsft import __version__
from dsft.cli.app import COMMANDS, build, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for entry in COMMANDS:
        assert entry.name in text
        assert entry.help in text


def test_without_arguments_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    without = capsys.readouterr().out
    main(["-h"])
    assert without == capsys.readouterr().out != ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dsft {__version__}\n"


def test_a_misspelt_command_brings_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Did you mean 'train'?" in captured.err


def test_command_names_take_both_spellings() -> None:
    command = build()
    command.commands = {"estimate-memory": command.commands["train"]}
    with command.make_context("dsft", ["estimate_memory"], resilient_parsing=True) as context:
        name, found, _ = command.resolve_command(context, ["estimate_memory"])
    assert name == "estimate-memory"
    assert found is not None


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["--nope"], "dsft has no option --nope", "`dsft --help`"),
        (["train", "--lora-rank", "8"], "dsft train has no option --lora-rank", "Did you mean --lora-r?"),
        (["train", "--max_lenght", "8"], "dsft train has no option --max-lenght", "Did you mean --max-length?"),
        (["train", "--lora-r"], "requires an argument", "--help"),
        (["train", "--packing", "true"], "unexpected extra argument", "`dsft train --help`"),
    ],
)
def test_wrong_usage_is_told_with_a_way_on(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str, hint: str
) -> None:
    assert main(args) == 2
    error, hint_line = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint_line.startswith("hint: ")
    assert hint in hint_line


def test_json_before_the_command_makes_the_error_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "train"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "UsageError"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dsft tr", {"train"}),
        ("dsft train --lora-", {"--lora-r", "--lora-alpha", "--lora-dropout"}),
        ("dsft train --lr-scheduler c", {"cosine", "constant"}),
        ("dsft train --preset b", {"balanced"}),
    ],
)
def test_a_shell_completes_names_and_values(words: str, expected: set[str]) -> None:
    environment = os.environ | {
        "_DSFT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-m", "dsft"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert set(completed.stdout.split()) == expected
