"""Fenced code in answers: found by CommonMark's rules, in pieces cut anywhere, with nothing lost."""

import random

import pytest

from dsft.infer.code_block import FenceReader, FirstBlockReader, Part, find_code

ANSWER = (
    "Hier:\n\n1. so\n\n   ```Python title=x\n   def f():\n       '''Doc `x`\n\n       ~~~\n       '''\n   ```\n"
    'text `a` ```x``` ~~\n~~~~ js\nconst a = "日本 😀";\n```\n~~~\n~~~~\r\nend\n```\nlast'
)

LANGUAGES = ("python", "js", "")


def read(text: str, size: int | random.Random) -> list[Part]:
    reader = FenceReader()
    parts, start = [], 0
    while start < len(text):
        end = start + (size if isinstance(size, int) else size.randint(1, 6))
        parts += reader.push(text[start:end])
        start = end
    return parts + reader.flush()


def join(parts: list[Part]) -> list[tuple[str, str, str]]:
    joined: list[tuple[str, str, str]] = []
    for part in parts:
        if joined and joined[-1][:2] == (part.kind, part.language) and part.kind != "fence":
            joined[-1] = (part.kind, part.language, joined[-1][2] + part.text)
        else:
            joined.append((part.kind, part.language, part.text))
    return joined


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```\nx\n```", "x\n"),
        ("~~~c++\nx\n~~~", "x\n"),
        ("```py\nfirst\n```\n```py\nsecond\n```", "first\n"),
        ("````md\n```py\nx\n```\n````", "```py\nx\n```\n"),  # a shorter fence is content
        ("```py\nx\n````", "x\n"),  # a longer one closes
        ("```py\nx\n~~~\ny\n```", "x\n~~~\ny\n"),
        ("```py\nx\n``` y\nz\n```", "x\n``` y\nz\n"),  # nothing may follow a closing fence
        ("```py\nx = 1\nprint(", "x = 1\nprint("),  # cut off
        ("```py\nx\n``", "x\n``"),
        ("- a\n    ```py\n    if x:\n        y\n\n  z\n    ```", "if x:\n    y\n\nz\n"),
        ("```py\r\nx\r\n```\r\ny", "x\r\n"),
        ("```\n```", ""),
        ("```py", ""),
        ("def f():\n    return `1`\n", "def f():\n    return `1`\n"),
        ("Use ```x``` there.\n```x``` too", "Use ```x``` there.\n```x``` too"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer_is_its_first_block(answer: str, code: str) -> None:
    assert find_code(answer) == code
    reader = FirstBlockReader()
    one_by_one = [part for character in answer for part in reader.push(character)] + reader.flush()
    assert "".join(part.text for part in one_by_one) == code


def test_an_answer_is_read_the_same_however_it_is_cut() -> None:
    whole = join(read(ANSWER, len(ANSWER)))
    assert [text for kind, _, text in whole if kind == "fence"] == [
        "   ```Python title=x\n",
        "   ```\n",
        "~~~~ js\n",
        "~~~~\r\n",
        "```\n",
    ]
    code = {
        language: "".join(text for kind, of, text in whole if (kind, of) == ("code", language))
        for language in LANGUAGES
    }
    assert code == {
        "python": "def f():\n    '''Doc `x`\n\n    ~~~\n    '''\n",
        "js": 'const a = "日本 😀";\n```\n~~~\n',
        "": "last",
    }
    for seed in range(200):
        parts = read(ANSWER, random.Random(seed))
        assert "".join(part.text for part in parts) == ANSWER
        assert join(parts) == whole


def test_text_is_held_back_only_where_it_may_be_a_fence() -> None:
    reader = FenceReader()
    assert reader.push("So") == [Part("prose", "So")]
    assert reader.push("``` x\n``") == [Part("prose", "``` x\n")]
    assert reader.push("x") == [Part("prose", "``x")]
    assert reader.push("\n```py") == [Part("prose", "\n")]
    assert reader.push("\n  ") == [Part("fence", "```py\n", "py")]
    assert reader.push("a") == [Part("code", "  a", "py")]
    assert reader.push(" b") == [Part("code", " b", "py")]


def test_code_streams_as_it_comes_and_prose_waits_for_the_end() -> None:
    reader = FirstBlockReader()
    assert reader.push("Here:\n```py\nx =") == [Part("code", "x =", "py")]
    assert reader.push(" 1\n```\nmore") == [Part("code", " 1\n", "py")]
    assert reader.flush() == []
    bare = FirstBlockReader()
    assert bare.push("x = 1\n") == []
    assert bare.flush() == [Part("prose", "x = 1\n")]


def test_the_first_block_is_complete_with_its_closing_line() -> None:
    reader = FirstBlockReader()
    told = []
    for piece in ["Here:\n", "```py\nx", " = 1\n", "``", "`", "\n"]:
        reader.push(piece)
        told.append(reader.is_complete)
    assert told == [False, False, False, False, False, True]
