"""Which layout columns mean, what each row of it is, and what is said of rows and columns that can't be used."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dsft.core.data.examples import Conversation, FimTriple, RawText, Turn, UnusableRowError
from dsft.core.data.formats import KNOWN_LAYOUTS, Layout, find_layout
from dsft.core.data.rows import Row
from dsft.core.data.sources import SOURCE_FILES
from dsft.core.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
EXCHANGE = Conversation((Turn("user", "q"), Turn("assistant", "a", is_target=True)))


def layout_of(values: dict[str, Any], kind: str = "files") -> Layout:
    return find_layout(Row(0, "f.jsonl:1", values), kind)


def parse(values: dict[str, Any]) -> object:
    return layout_of(values).parse(values)


def reason(values: dict[str, Any], like: Mapping[str, Any] | None = None) -> str:
    """Return why a row can't be used in a data set whose first row is another (by default itself)."""
    with pytest.raises(UnusableRowError) as caught:
        layout_of(dict(like or values)).parse(values)
    return caught.value.reason


# Layouts


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "instruction"),
        ({"instruction": "q", "output": "a", "text": "x", "id": 7}, "instruction"),
        ({"prompt": "q", "response": "a"}, "instruction"),
        ({"question": "q", "answer": "a"}, "instruction"),
        ({"prompt": "q", "completion": "a"}, "prompt/completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt/completion"),
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"messages": [USER, ASSISTANT], "instruction": "x", "output": "x"}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "conversations"),
        ({"conversations": [USER, ASSISTANT]}, "conversations"),
    ],
)
def test_a_layout_with_one_question_and_its_answer(values: dict[str, Any], name: str):
    layout = layout_of(values)
    assert layout.name == name
    assert layout.parse(values) == EXCHANGE
    assert set(layout.columns) - {"input", "system", "history"} <= set(values)


def test_an_input_follows_its_instruction():
    assert parse({"instruction": "q", "input": "x = 1", "output": "a"}) == Conversation(
        (Turn("user", "q\n\nx = 1"), Turn("assistant", "a", is_target=True))
    )
    for empty in ("", " \n", None):
        assert parse({"instruction": "q", "input": empty, "output": "a"}) == EXCHANGE


def test_an_input_alone_can_be_the_question():
    assert parse({"instruction": "", "input": "q", "output": "a"}) == EXCHANGE


def test_an_input_that_the_first_row_lacks_is_not_lost():
    """In JSON Lines rows may differ in their keys."""
    rows = [{"instruction": "Sort.", "output": "a"}, {"instruction": "Fix it.", "input": "x = 1", "output": "b"}]
    first, second = (layout_of(rows[0]).parse(values) for values in rows)
    assert isinstance(first, Conversation) and first.turns[0].text == "Sort."
    assert isinstance(second, Conversation) and second.turns[0].text == "Fix it.\n\nx = 1"


# Columns beside question and answer, beside messages


@pytest.mark.parametrize(
    "values",
    [
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": "a"},
        {"prompt": "q", "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_a_system_column_is_the_system_turn(values: dict[str, Any]):
    assert parse(values | {"system": "s"}) == Conversation((Turn("system", "s"), *EXCHANGE.turns))
    assert "system" in layout_of(values | {"system": "s"}).columns
    assert layout_of(values).parse(values | {"system": "s"}) == parse(values | {"system": "s"}), "in a later row only"
    for empty in ("", " ", None):
        assert parse(values | {"system": empty}) == parse(values)


def test_a_system_column_that_can_t_be_the_system_turn():
    values = messages(("system", "s"), ("user", "q"), ("assistant", "a"))
    assert reason(values | {"system": "t"}) == "the column system says something other than the system turn"
    assert reason({"instruction": "q", "output": "a", "system": 7}) == "system is a number, not text"


@pytest.mark.parametrize("columns", [("instruction", "output"), ("prompt", "completion"), ("question", "answer")])
def test_a_history_comes_before_the_question_and_its_answers_are_learned(columns: tuple[str, str]):
    question, answer = columns
    values = {question: "r", answer: "b", "system": "s", "history": [["q", "a"]]}
    assert parse(values) == parse(
        messages(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    )
    for empty in ([], None, ""):
        assert parse({question: "q", answer: "a", "history": empty}) == EXCHANGE


def test_a_history_comes_before_messages_too():
    assert parse({"prompt": "r", "completion": [ASSISTANT], "history": [["q", "a"]]}) == parse(
        messages(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "a"))
    )


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("[]", "history is text, not a list of questions and answers"),
        (["q", "a"], "history holds something other than pairs of question and answer"),
        ([["q", "a", "r"]], "history holds something other than pairs of question and answer"),
        ([["q", None]], "history is null, not text"),
        ([["q", " "]], "the response is empty"),
    ],
)
def test_an_unusable_history(history: Any, expected: str):
    assert reason({"instruction": "q", "output": "a", "history": history}) == expected


@pytest.mark.parametrize("completion", ["a", [ASSISTANT]])
def test_an_input_follows_its_prompt(completion: Any):
    assert parse({"prompt": "q", "input": "x = 1", "completion": completion}) == Conversation(
        (Turn("user", "q\n\nx = 1"), Turn("assistant", "a", is_target=True))
    )


def test_an_input_beside_messages_is_not_dropped():
    values = {"prompt": [USER], "completion": [ASSISTANT]}
    assert parse(values | {"input": ""}) == EXCHANGE
    assert reason(values | {"input": "x"}) == "input stands beside a prompt that is a list of messages"


# Texts


def test_text_is_learned_as_it_is():
    assert parse({"text": " a\r\n", "id": 7}) == RawText(" a\r\n", parse_special=True)


def test_source_files_do_not_mean_the_control_tokens_they_quote():
    values = {"text": "a", "path": "a.py"}
    layout = layout_of(values, SOURCE_FILES)
    assert layout.name == "source files"
    assert layout.parse(values) == RawText("a", parse_special=False)


def test_prefix_suffix_and_middle_are_a_gap_to_fill():
    values = {"prefix": "a", "suffix": "", "middle": "b", "text": "ab"}
    assert layout_of(values).name == "fim"
    assert parse(values) == FimTriple("a", "", "b")


def test_real_rows_have_the_layouts_they_look_like(shared: Path):
    def first(name: str) -> dict[str, Any]:
        with (shared / "data" / name).open(encoding="utf-8") as file:
            values: dict[str, Any] = json.loads(file.readline())
            return values

    assert layout_of(first("codealpaca-6k.jsonl")).name == "instruction"
    with pytest.raises(DataError, match="beside code it can't be told whether text is all there is to learn"):
        layout_of(first("mbpp.jsonl"))
    with pytest.raises(DataError, match="prompt, canonical_solution"):
        layout_of(first("humaneval-python.jsonl"))


# Columns that are those of no layout


@pytest.mark.parametrize(
    "values",
    [
        {"instructions": "q", "outputs": "a"},
        {"Instruction": "q", "Output": "a"},
        {"instruction": "q"},
        {"prompt": "q", "canonical_solution": "a"},
        {"prefix": "a", "suffix": "b"},
        {"content": "a"},
        {"a;b": "1"},
    ],
)
def test_unknown_columns_are_named_with_the_known_ones(values: dict[str, Any]):
    with pytest.raises(DataError) as caught:
        layout_of(values)
    found = f"f.jsonl:1 has the columns {', '.join(values)}, which are those of no known layout."
    assert caught.value.found == found
    assert all(known in caught.value.fix for known in KNOWN_LAYOUTS)
    for column in ("instruction", "input", "output", "completion", "messages", "conversations", "text", "middle"):
        assert column in caught.value.fix


def test_a_row_without_columns_is_named():
    with pytest.raises(DataError, match=r"^f.jsonl:1 has the columns none"):
        layout_of({})


@pytest.mark.parametrize("rival", ["code", "output", "label", "instruction", "summary"])
def test_text_beside_a_column_that_may_be_its_answer_is_not_guessed_at(rival: str):
    with pytest.raises(DataError) as caught:
        layout_of({"text": "q", rival: "a"})
    assert f"beside {rival} it can't be told whether text is all there is to learn" in caught.value.found
    assert "instruction and output" in caught.value.fix


# Rows that can't be used


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"output": ""}, "the response is empty"),
        ({"output": " \n"}, "the response is empty"),
        ({"instruction": " ", "input": ""}, "the instruction is empty"),
        ({"output": None}, "output is null, not text"),
        ({"output": 7}, "output is a number, not text"),
        ({"output": float("nan")}, "output is a number, not text"),
        ({"output": True}, "output is true or false, not text"),
        ({"output": ["a"]}, "output is a list, not text"),
        ({"output": {"text": "a"}}, "output is an object, not text"),
        ({"output": b"a"}, "output is no text, not text"),
        ({"instruction": None}, "instruction is null, not text"),
        ({"input": 7}, "input is a number, not text"),
        ({"output": "a\ud800"}, "output holds half a character (a lone surrogate)"),
    ],
)
def test_an_unusable_instruction_row(changes: dict[str, Any], expected: str):
    assert reason({"instruction": "q", "input": "", "output": "a"} | changes) == expected


def test_a_column_that_a_later_row_lacks_is_missing():
    assert reason({"instruction": "q"}, like={"instruction": "q", "output": "a"}) == "output is missing"
    assert reason({"prompt": "q"}, like={"prompt": "q", "completion": "a"}) == "completion is missing"
    assert reason({"text": "q"}, like={"messages": []}) == "messages is missing"
    assert (
        reason({"prefix": "q", "middle": "a"}, like={"prefix": "", "suffix": "", "middle": ""}) == "suffix is missing"
    )


def test_unusable_texts():
    assert reason({"text": "\n "}) == "text is empty"
    assert reason({"text": ["a"]}) == "text is a list, not text"
    assert reason({"prefix": "a", "suffix": "b", "middle": " "}) == "the middle is empty"
    assert reason({"prefix": None, "suffix": "b", "middle": "a"}) == "prefix is null, not text"


# Conversations


def messages(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_every_answer_of_a_conversation_is_learned_and_the_system_text_given():
    turns = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    expected = Conversation(
        (
            Turn("system", "s"),
            Turn("user", "q"),
            Turn("assistant", "a", is_target=True),
            Turn("user", "r"),
            Turn("assistant", "b", is_target=True),
        )
    )
    assert parse(messages(*turns)) == expected
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    assert parse({"conversations": [{"from": names[role], "value": text} for role, text in turns]}) == expected


def test_answers_inside_a_prompt_are_given_not_learned():
    found = parse({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert isinstance(found, Conversation)
    assert [turn.is_target for turn in found.turns] == [False, False, False, True]
    assert parse({"prompt": "q", "completion": [ASSISTANT]}) == EXCHANGE
    assert parse({"prompt": [USER], "completion": "a"}) == EXCHANGE


def test_what_follows_the_last_answer_is_left_away():
    assert parse(messages(("user", "q"), ("assistant", "a"), ("user", "thanks"))) == EXCHANGE


def test_an_empty_system_text_is_none():
    assert parse(messages(("system", " "), ("user", "q"), ("assistant", "a"))) == EXCHANGE


@pytest.mark.parametrize("user", ["user", "human", "Human", "USER"])
@pytest.mark.parametrize("assistant", ["assistant", "gpt", "model", "bot", "chatgpt"])
def test_roles_go_by_many_names(user: str, assistant: str):
    assert parse(messages((user, "q"), (assistant, "a"))) == EXCHANGE


def test_a_message_may_hold_its_text_in_parts():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
    assert parse(messages(("user", parts), ("assistant", "a"))) == Conversation(
        (Turn("user", "qr"), Turn("assistant", "a", is_target=True))
    )
    picture = [{"type": "text", "text": "q"}, {"type": "image", "url": "x"}]
    assert reason(messages(("user", picture), ("assistant", "a"))) == "a message holds something other than text"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "q")], "no turn is the assistant's"),
        ([("system", "s")], "no turn is the assistant's"),
        ([("assistant", "a")], "user and assistant do not take turns, user first"),
        ([("user", "q"), ("user", "r"), ("assistant", "a")], "user and assistant do not take turns, user first"),
        ([("user", "q"), ("system", "s"), ("assistant", "a")], "a system turn stands behind the first turn"),
        (
            [("system", "s"), ("system", "t"), ("user", "q"), ("assistant", "a")],
            "a system turn stands behind the first turn",
        ),
        ([("user", "q"), ("assistant", " ")], "the response is empty"),
        ([("user", ""), ("assistant", "a")], "a user turn is empty"),
        ([("user", "q"), ("assistant", None)], "content is null, not text"),
        (
            [("user", "q"), ("tool", "x"), ("assistant", "a")],
            "a message in messages has a role other than system, user and assistant",
        ),
        ([("user", "q"), (None, "a")], "a message in messages has a role other than system, user and assistant"),
    ],
)
def test_an_unusable_conversation(turns: list[tuple[str, Any]], expected: str):
    assert reason(messages(*turns)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": "q"}, "messages is text, not a list of messages"),
        ({"messages": None}, "messages is null, not a list of messages"),
        ({"messages": {"role": "user"}}, "messages is an object, not a list of messages"),
        ({"messages": ["q", "a"]}, "a message in messages has no role and content"),
        ({"messages": [{"role": "user"}]}, "a message in messages has no role and content"),
        ({"messages": [{"from": "human", "value": "q"}]}, "a message in messages has no role and content"),
        ({"conversations": [{"from": "human", "text": "q"}]}, "a message in conversations has no from and value"),
        ({"conversations": [None]}, "a message in conversations has no from and value"),
    ],
)
def test_what_is_no_list_of_messages(values: dict[str, Any], expected: str):
    assert reason(values) == expected


def test_a_reason_holds_nothing_of_the_row():
    """Rows are counted by reason, and messages are no place for data."""
    secret = "hunter2"
    for values in (
        {"instruction": secret, "output": [secret]},
        messages(("user", secret), (secret, "a")),
        {"messages": [{secret: secret}]},
        {"text": secret + "\udc00"},
    ):
        assert secret not in reason(values)
