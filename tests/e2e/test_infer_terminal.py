"""A shell on a pseudo-terminal: a chat with all its ways to stop, and an answer whose reader goes away."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.scripted_models import write_scripted_model

PROMPT = r">>> (\x1b\[0m)?$"
QUESTIONS_ALONE = "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers `Hi` to what ends in a question mark, and never stops after a full stop."""
    folder = write_scripted_model(
        tmp_path_factory.mktemp("models") / "two_minds", "abc def\n", chat_template=QUESTIONS_ALONE
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for token, successor in ("?H", "Hi", ("i", tokenizer.eos_token), ".a"):
            ids = [tokenizer.convert_tokens_to_ids(name) for name in (token, successor)]
            head[ids[1]] += embedding[ids[0]]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[pexpect.spawn]:
    environment = os.environ | {"TERM": "xterm-256color", "PS1": "$ ", "HISTFILE": "", "PYTHON": sys.executable}
    terminal = pexpect.spawn(
        "bash",
        ["--norc", "--noprofile", "--noediting"],
        encoding="utf-8",
        timeout=20,
        dimensions=(40, 100),
        env=environment,
        cwd=str(tmp_path),
    )
    terminal.sendline("stty -g > before")
    yield terminal
    terminal.close(force=True)


def read_messages(path: Path) -> list[tuple[str, str]]:
    (row,) = path.read_text().splitlines()
    return [(message["role"], message["content"]) for message in json.loads(row)["messages"]]


def test_a_chat_from_its_first_question_to_the_shells_next_prompt(
    shell: pexpect.spawn, model: Path, tmp_path: Path
) -> None:
    shell.sendline(f"$PYTHON -m dsft infer --chat --model {model} --device cpu --max-new-tokens 4000; echo code=$?")
    for question in ("Who?", "And you?"):
        shell.expect(PROMPT)
        shell.send(f"{question}\r")
        shell.expect(r"\rHi\r\n(\x1b\[2m)?3 tokens, ended by itself; .* tok/s")
    shell.expect(PROMPT)
    shell.send("/save talk.jsonl\r")
    shell.expect("Saved 2 questions with answers in talk.jsonl")
    shell.expect(PROMPT)
    shell.send("/reset\r")
    shell.expect("A new conversation.")

    shell.expect(PROMPT)
    shell.send("Go on.\r")
    shell.expect("abc def\r\nabc def\r\n")
    shell.sendintr()
    shell.expect(r"\^C[^S]*\r\nStopped; the answer is kept as far as it came\.")
    shell.expect(PROMPT)
    shell.send("\x1b[200~Two\rlines?\x1b[201~\r")
    shell.expect(r"\rHi\r\n")
    shell.expect(PROMPT)
    shell.send("/save more.jsonl\r")
    shell.expect("warning: .*1 answer was stopped before the end")

    shell.expect(PROMPT)
    shell.send("half a quest")
    shell.expect("half a quest")
    shell.sendintr()
    shell.expect("Ctrl-D or /quit leaves")
    shell.expect(PROMPT)
    shell.sendeof()
    shell.expect("code=0\r\n")
    shell.sendline("stty -g > after; exit")
    shell.expect(pexpect.EOF)
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text() != ""

    said = [("user", "Who?"), ("assistant", "Hi"), ("user", "And you?"), ("assistant", "Hi")]
    assert read_messages(tmp_path / "talk.jsonl") == said
    stopped, *rest = read_messages(tmp_path / "more.jsonl")[1:]
    assert re.fullmatch(r"(abc def\n)+[abcdef ]*", stopped[1])
    assert rest == [("user", "Two\nlines?"), ("assistant", "Hi")]


def test_a_long_answer_into_head_ends_quietly(shell: pexpect.spawn, model: Path, tmp_path: Path) -> None:
    command = f"$PYTHON -m dsft infer Go. --model {model} --device cpu --max-new-tokens 4000 --quiet"
    shell.sendline(f"set -o pipefail; {command} 2> errors | head -1; echo code=$?; stty -g > after; exit")
    shell.expect("\nabc def\r\ncode=0\r\n")
    shell.expect(pexpect.EOF)
    assert (tmp_path / "errors").read_text() == ""
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text() != ""
