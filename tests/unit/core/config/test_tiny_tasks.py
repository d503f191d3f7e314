"""The instruction data set of the tiny preset: its form, and that no task of one file is solved in the other."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from dsft.core.paths import presets_dir

Row = dict[str, str]

KEYS = {"instruction", "output", "language"}
LANGUAGES = {"python", "cuda"}
MAX_ANSWER_LINES = 6
MAX_ANSWER_COLUMNS = 110
MAX_SAMPLE_CHARACTERS = 500
NUM_TRAIN = 538
NUM_HELD_OUT = 70


def read_tasks(name: str) -> list[Row]:
    text = (presets_dir() / "tiny" / f"tasks-{name}.jsonl").read_text(encoding="ascii")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


TRAIN = read_tasks("train")
HELD_OUT = read_tasks("heldout")
BOTH = TRAIN + HELD_OUT


def one_line(text: str) -> str:
    return " ".join(text.split())


def prompt(row: Row) -> str:
    return one_line(row["instruction"] + "\n" + row.get("input", ""))


def without_names(answer: str) -> str:
    """Replace the names of the function and its parameters, so that a renamed copy of an answer equals it."""
    definition = re.search(r"(\w+)\(([^()]*)\)\s*[:{]$", answer, re.MULTILINE)
    if definition is None:
        return one_line(answer)
    parameters = [re.findall(r"\w+", part)[-1] for part in definition[2].split(",") if part.strip()]
    new_names = {definition[1]: "f"} | {name: f"p{position}" for position, name in enumerate(parameters)}
    return one_line(re.sub(r"[A-Za-z_]\w*", lambda word: new_names.get(word[0], word[0]), answer))


def repeated(texts: Iterator[str]) -> list[str]:
    return [text for text, count in Counter(texts).items() if count > 1]


def test_both_files_have_their_tasks() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (NUM_TRAIN, NUM_HELD_OUT)


def test_rows_have_the_form_the_preset_relies_on() -> None:
    for row in BOTH:
        check_form(row)


def check_form(row: Row) -> None:
    assert KEYS <= set(row) <= KEYS | {"input"}
    assert all(isinstance(value, str) and value and value == value.strip() for value in row.values())
    assert all(value.isascii() and "\t" not in value and "```" not in value for value in row.values())
    assert row["language"] in LANGUAGES
    assert row["instruction"].endswith(".")
    assert "\n" not in row["instruction"]
    lines = row["output"].split("\n")
    assert len(lines) <= MAX_ANSWER_LINES
    assert max(map(len, lines)) <= MAX_ANSWER_COLUMNS
    assert all(line == line.rstrip() for line in lines)
    assert len(row["instruction"] + row.get("input", "") + row["output"]) <= MAX_SAMPLE_CHARACTERS


@pytest.mark.parametrize("tasks", [TRAIN, HELD_OUT], ids=["train", "heldout"])
def test_two_thirds_are_python(tasks: list[Row]) -> None:
    assert sum(row["language"] == "python" for row in tasks) / len(tasks) == pytest.approx(2 / 3, abs=0.05)


def test_some_tasks_of_both_files_have_an_input() -> None:
    for tasks in (TRAIN, HELD_OUT):
        assert 0.01 < sum("input" in row for row in tasks) / len(tasks) < 0.1


def test_no_prompt_and_no_answer_occurs_twice() -> None:
    assert repeated(map(prompt, BOTH)) == []
    assert repeated(one_line(row["output"]) for row in BOTH) == []


def test_no_answer_is_another_one_under_new_names() -> None:
    assert without_names("def f(a, b):\n    return a + b") == without_names("def add(x, y):\n    return x + y")
    assert repeated(without_names(row["output"]) for row in BOTH) == []


def test_python_answers_compile_and_define_what_the_instruction_names() -> None:
    for row in BOTH:
        if row["language"] != "python":
            continue
        tree = ast.parse(row["output"])
        (name,) = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        assert re.search(rf"\b{name}\b", row["instruction"]), row["instruction"]
        if isinstance(function := tree.body[-1], ast.FunctionDef):
            signature = f"{name}({', '.join(argument.arg for argument in function.args.args)})"
            assert signature in row["instruction"]
        assert ast.get_docstring(tree.body[-1]) is None  # type: ignore[arg-type]


def test_cuda_answers_define_what_the_instruction_names() -> None:
    for row in BOTH:
        definition = re.search(r"(kernel|device function|macro) (\w+\(.*?\))", row["instruction"])
        if row["language"] != "cuda" or definition is None:
            continue
        kind = {"kernel": "__global__ void ", "device function": "__device__ ", "macro": "#define "}[definition[1]]
        name, _, arguments = definition[2].rstrip(")").partition("(")
        head = row["output"].split("\n")[0]
        assert head.startswith(kind)
        assert re.search(rf"\b{name}\(", head)
        in_answer = re.search(r"\((.*?)\)", head)
        assert in_answer is not None
        assert [part.split("*")[-1].split()[-1] for part in in_answer[1].split(",") if part] == [
            part.strip() for part in arguments.split(",") if part
        ]


def test_cuda_answers_close_what_they_open() -> None:
    for row in BOTH:
        if row["language"] == "cuda":
            for opening, closing in ("()", "[]", "{}"):
                assert row["output"].count(opening) == row["output"].count(closing)
            assert row["output"][-1] in "};" or row["output"].startswith("#define ")
