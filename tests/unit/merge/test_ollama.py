"""The Modelfile: its text, and that the template in it writes what training read."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dsft.core.data.examples import Conversation, Turn
from dsft.core.data.prompts import FimPrompt, PromptTemplate, get_template
from dsft.merge.ollama import write_modelfile, write_prompt_template
from tests.unit.core.data.small_tokenizer import BOS, CHAT_ML, EOS, make_deepseek_like
from tests.unit.merge.go_template import execute, parse_modelfile

GOLDEN = """\
FROM ./model-f16.gguf
TEMPLATE \"\"\"{{ if .System }}{{ .System }}

{{ end }}{{ range $index, $turn := .Messages }}{{ if eq .Role "user" }}### Instruction:
{{ .Content }}

### Response:
{{ else if eq .Role "assistant" }}{{ .Content }}{{ if gt (len (slice $.Messages $index)) 1 }}<｜end▁of▁sentence｜>

{{ end }}{{ end }}{{ end }}\"\"\"
PARAMETER stop "<｜end▁of▁sentence｜>"
PARAMETER temperature 0
PARAMETER repeat_penalty 1
PARAMETER num_ctx 4096
"""

AWKWARD = (
    "{{ '{{ .System }} {' }}{% for message in messages %}{% if message.role == 'user' %}"
    '{{ \'"""\n""""\r\t{\' + message.content + \'}{{ end }}{{\' }}{% elif message.role == \'system\' %}'
    "{{ '\u00a0' + message.content + '\u200b\"\"' }}{% else %}"
    "{{ message.content + '\"' + eos_token + '\"\n' }}{% endif %}{% endfor %}"
)
"""Writes what means something in Go's templates and in Modelfiles, or what their parser drops."""


def serve(template: PromptTemplate) -> str:
    """Return the prompt template as Ollama reads it from a Modelfile."""
    content = write_modelfile("m.gguf", write_prompt_template(template), ["<|EOT|>"], 16384)
    return dict(parse_modelfile(content))["TEMPLATE"]


def converse(texts: list[str], system: str | None = None) -> list[Turn]:
    turns = [] if system is None else [Turn("system", system)]
    return turns + [Turn("assistant", text, True) if i % 2 else Turn("user", text) for i, text in enumerate(texts)]


def ask(go_template: str, turns: list[Turn]) -> str:
    return execute(go_template, [{"role": turn.role, "content": turn.text} for turn in turns])


def written(template: PromptTemplate, turns: list[Turn]) -> str:
    segments = (
        template.render_prompt(turns) if turns[-1].role == "user" else template.render(Conversation(tuple(turns)))
    )
    return "".join(segment.text for segment in segments)


def test_the_file_of_the_seeds_template():
    template = get_template("instruction", make_deepseek_like())
    assert write_modelfile("model-f16.gguf", write_prompt_template(template), [EOS], 16384) == GOLDEN


@pytest.mark.parametrize(
    ("name", "chat_template"),
    [("instruction", None), ("deepseek", None), ("chat", CHAT_ML), ("chat", AWKWARD)],
)
@pytest.mark.parametrize("system", [None, 'Be "brief" {{ now }}.\n', "Two\n\nlines"])
def test_prompts_are_those_of_training_without_bos(name, chat_template, system):
    template = get_template(name, make_deepseek_like(chat_template))
    go_template = serve(template)
    texts = ["Sort {x}.", "{{ sorted }}", "  '''\n\"\"\"", "\n\nb\n", "世界 <|EOT|>"]
    for length in (1, 3, 5):
        turns = converse(texts[:length], system)
        assert ask(go_template, turns) == written(template, turns).removeprefix(BOS)
    assert not go_template.startswith(BOS), "llama.cpp puts it"


@pytest.mark.parametrize("name", ["instruction", "deepseek"])
def test_an_answer_that_comes_last_is_gone_on_with(name):
    template = get_template(name, make_deepseek_like())
    turns = converse(["Sort.", "def sort("])
    assert ask(serve(template), turns) == written(template, turns[:1]).removeprefix(BOS) + "def sort("


def test_the_real_tokenizer(shared):
    folder: Path = shared / "assets" / "deepseek-coder-6.7b"
    template = get_template("deepseek", AutoTokenizer.from_pretrained(folder, local_files_only=True))
    turns = converse(["Sort.", "sorted(x)", "Reverse."])
    assert ask(serve(template), turns) == written(template, turns).removeprefix(BOS)


def test_a_bos_that_only_the_chat_template_writes_stays():
    chat_template = "{{ bos_token }}" + CHAT_ML
    for adds_bos in (True, False):
        template = get_template("chat", make_deepseek_like(chat_template, adds_bos=adds_bos))
        assert ask(serve(template), converse(["Sort."])).count(BOS) == (0 if adds_bos else 1)


def test_gaps():
    template = get_template("fim", make_deepseek_like())
    go_template = serve(template)
    for prefix, suffix in (("def f():\n", "\nprint()"), ("def f():\n", "")):
        expected = "".join(segment.text for segment in template.render_prompt(FimPrompt(prefix, suffix)))
        assert execute(go_template, prompt=prefix, suffix=suffix) == expected.removeprefix(BOS)


def test_texts_are_gone_on_with_as_they_are():
    template = get_template("text", make_deepseek_like())
    assert serve(template) == "{{ .Prompt }}"
    assert execute("{{ .Prompt }}", prompt="def f") == "def f"


def test_a_chat_template_that_can_t_be_taken_apart_is_left_to_ollama():
    chat_template = CHAT_ML.replace("{{ message.content }}", "{{ loop.index }}{{ message.content }}")
    assert write_prompt_template(get_template("chat", make_deepseek_like(chat_template))) is None
    commands = dict(parse_modelfile(write_modelfile("m.gguf", None, ["<|im_end|>"], 16384)))
    assert "TEMPLATE" not in commands
    assert commands["stop"] == "<|im_end|>"


@pytest.mark.parametrize(("num_positions", "expected"), [(16384, "4096"), (2048, "2048"), (None, None)])
def test_the_context_is_at_most_the_models(num_positions, expected):
    commands = dict(parse_modelfile(write_modelfile("m.gguf", "{{ .Prompt }}", [], num_positions)))
    assert commands.get("num_ctx") == expected
    assert commands["FROM"] == "./m.gguf"
    assert (commands["temperature"], commands["repeat_penalty"]) == ("0", "1")


def test_every_end_token_stops_an_answer():
    texts = ["<|EOT|>", 'an "odd" one', " <end> "]
    commands = parse_modelfile(write_modelfile("m.gguf", "{{ .Prompt }}", texts, None))
    assert [value for command, value in commands if command == "stop"] == texts
