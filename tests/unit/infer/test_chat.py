"""A conversation: what each turn reads, what stays after an interrupt or error, a full context, and saved rows."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from dsft.core.data.examples import Conversation, Turn
from dsft.core.data.file_rows import read_rows
from dsft.core.data.formats import find_layout
from dsft.core.data.rows import Row
from dsft.core.errors import ConfigError, InputError, ModelError, WriteError
from dsft.infer.chat import Chat, Exchange
from dsft.infer.chat_file import put_row
from dsft.infer.config import InferConfig
from dsft.infer.session import Session
from tests.closed_folders import refuse_to_open_folders
from tests.scripted_models import TURN_END, write_random_model, write_scripted_model, write_summary

NO_SYSTEM_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
)
DEAF_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_random_model(folder / "random")
    write_scripted_model(folder / "greeting", "Hey, du?")
    write_scripted_model(folder / "short", "abc def\n", max_position_embeddings=256)
    write_scripted_model(folder / "no_system", "Hi!", chat_template=NO_SYSTEM_TEMPLATE)
    write_scripted_model(folder / "deaf", "Hi!", chat_template=DEAF_TEMPLATE)
    for path in write_scripted_model(folder / "deepseek", "Hi!\n").glob("tokenizer*.json"):
        path.write_text(path.read_text().replace(TURN_END, "<|EOT|>"))
    return folder


@pytest.fixture
def notices() -> list[str]:
    return []


MakeChat = Callable[..., Chat]


@pytest.fixture
def make_chat(models: Path, notices: list[str]) -> MakeChat:
    def make(model: str, template: Any = "auto", **settings: Any) -> Chat:
        config = InferConfig(model=str(models / model), device="cpu", template=template, **settings)
        chat = Chat(config, notices.append)
        notices.clear()  # of the template
        return chat

    return make


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that reached the model, pass by pass."""
    counts: list[int] = []
    forward = LlamaForCausalLM.forward

    def count(self: Any, input_ids: Any, **settings: Any) -> Any:
        counts.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **settings)

    monkeypatch.setattr(LlamaForCausalLM, "forward", count)
    return counts


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Turn]]:
    """The turns of each prompt that was answered."""
    prompts: dict[int, Any] = {}
    answered: list[list[Turn]] = []
    encode, answer = Session.encode, Session.answer

    def note_prompt(self: Session, prompt: Any) -> Any:
        encoded = encode(self, prompt)
        prompts[id(encoded)] = (encoded, list(prompt))
        return encoded

    def note_answer(self: Session, prompt: Any, *args: Any) -> Any:
        answered.append(prompts[id(prompt)][1])
        return answer(self, prompt, *args)

    monkeypatch.setattr(Session, "encode", note_prompt)
    monkeypatch.setattr(Session, "answer", note_answer)
    return answered


def ignore(_: str) -> None: ...


def interrupt_after(num_pieces: int) -> Callable[[str], None]:
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        if len(pieces) == num_pieces:
            raise KeyboardInterrupt

    return take


def fail_to_answer(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Session, "answer", fail)


def test_a_second_turn_reads_only_what_is_new(make_chat: MakeChat, reads: list[int]) -> None:
    chat = make_chat("greeting")
    first = chat.ask("One?", ignore)
    assert reads[0] == first.num_prompt_tokens
    reads.clear()
    second = chat.ask("Two?", ignore)
    new_text = "\n\n### Instruction:\nTwo?\n\n### Response:\n"
    assert reads[0] == len(new_text)
    assert second.num_prompt_tokens == first.num_prompt_tokens + first.num_new_tokens + len(new_text)
    assert set(reads[1:]) == {1}
    assert chat.exchanges == (Exchange("One?", "Hey, du?", False), Exchange("Two?", "Hey, du?", False))


def test_an_answer_depends_on_the_turns_before_it_as_if_they_were_read_anew(make_chat: MakeChat) -> None:
    chat = make_chat("random", max_new_tokens=20)
    chat.ask("One?", ignore)
    again = make_chat("random", max_new_tokens=20)
    (first,) = chat.exchanges
    turns = [Turn("user", "One?"), Turn("assistant", first.answer), Turn("user", "Two?")]
    fresh = again._session.answer(again._session.encode(turns), ignore)
    second = chat.ask("Two?", ignore)
    assert second.text == fresh.text
    assert second.text != make_chat("random", max_new_tokens=20).ask("Two?", ignore).text


def test_what_the_template_writes_behind_an_answer_is_not_said_twice(make_chat: MakeChat, reads: list[int]) -> None:
    chat = make_chat("deepseek", template="deepseek", max_new_tokens=5)
    first = chat.ask("One?", ignore)
    assert first.text == "Hi!\nH"
    chat.undo()
    chat = make_chat("deepseek", template="deepseek", max_new_tokens=4)
    chat.ask("One?", ignore)
    reads.clear()
    chat.ask("Two?", ignore)
    assert chat.exchanges[0].answer == "Hi!"
    # The cut answer's last token, a line end, was not read; nor was the end token, which never came.
    assert reads[0] == len("\n") + len(["<|EOT|>"]) + len("\n### Instruction:\nTwo?\n### Response:\n")


def test_an_interrupted_answer_stays_as_far_as_it_came(make_chat: MakeChat, asked: list[list[Turn]]) -> None:
    chat = make_chat("greeting")
    with pytest.raises(KeyboardInterrupt):
        chat.ask("One?", interrupt_after(3))
    assert chat.exchanges == (Exchange("One?", "Hey", True),)
    assert not chat.has_open_question
    assert chat.ask("Two?", ignore).text == "Hey, du?"
    assert asked[-1] == [Turn("user", "One?"), Turn("assistant", "Hey", True), Turn("user", "Two?")]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("NaN."), BrokenPipeError()])
def test_a_question_without_an_answer_is_no_part_of_it_but_can_be_asked_again(
    make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch, asked: list[list[Turn]], error: BaseException
) -> None:
    chat = make_chat("greeting")
    chat.ask("One?", ignore)
    with monkeypatch.context() as patched:
        fail_to_answer(patched, error)
        with pytest.raises(type(error)):
            chat.ask("Two?", ignore)
    assert [exchange.question for exchange in chat.exchanges] == ["One?"]
    assert chat.has_open_question
    chat.retry(ignore)
    assert [turn.text for turn in asked[-1]] == ["One?", "Hey, du?", "Two?"]
    assert not chat.has_open_question


def test_undo_drops_a_question_without_an_answer_alone(make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat("greeting")
    chat.ask("One?", ignore)
    with monkeypatch.context() as patched:
        fail_to_answer(patched, ModelError("NaN."))
        with pytest.raises(ModelError):
            chat.ask("Two?", ignore)
    assert chat.undo() == "Two?"
    assert [exchange.question for exchange in chat.exchanges] == ["One?"]
    assert not chat.has_open_question
    assert chat.undo() == "One?"
    assert chat.exchanges == ()


def test_an_answer_that_says_nothing_is_not_kept(make_chat: MakeChat) -> None:
    chat = make_chat("greeting", stop=("H",))
    assert chat.ask("One?", ignore).text == ""
    assert chat.exchanges == ()
    assert chat.has_open_question


def test_retry_undo_and_reset(make_chat: MakeChat, asked: list[list[Turn]]) -> None:
    chat = make_chat("greeting", system="Be brief.")
    for act in (chat.undo, lambda: chat.retry(ignore)):
        with pytest.raises(InputError, match="empty"):
            act()
    chat.ask("One?", ignore)
    chat.ask("Two?", ignore)
    chat.retry(ignore)
    assert asked[-1] == asked[-2]
    assert [exchange.question for exchange in chat.exchanges] == ["One?", "Two?"]
    assert chat.undo() == "Two?"
    chat.ask("Three?", ignore)
    assert [turn.text for turn in asked[-1]] == ["Be brief.", "One?", "Hey, du?", "Three?"]
    chat.reset()
    chat.ask("Four?", ignore)
    assert asked[-1] == [Turn("system", "Be brief."), Turn("user", "Four?")]


def test_the_system_text_can_change(make_chat: MakeChat, asked: list[list[Turn]]) -> None:
    chat = make_chat("greeting")
    chat.ask("One?", ignore)
    chat.change_system("Be kind.")
    chat.ask("Two?", ignore)
    assert asked[-1][0] == Turn("system", "Be kind.")
    chat.change_system(None)
    chat.ask("Three?", ignore)
    assert asked[-1][0] == Turn("user", "One?")


def test_a_full_context_leaves_out_the_oldest_questions_and_never_the_system_text(
    make_chat: MakeChat, asked: list[list[Turn]], notices: list[str]
) -> None:
    chat = make_chat("short", system="Be brief.", max_new_tokens=32)
    for number in range(6):
        result = chat.ask(f"Question {number}?", ignore)
        assert result.num_new_tokens == 32
        assert result.num_prompt_tokens <= 256 - 32
    assert len(chat.exchanges) == 6
    turns = asked[-1]
    assert turns[0].text == "Be brief."
    assert turns[-1].text == "Question 5?"
    num_seen = (len(turns) - 2) // 2
    assert turns[1].text == f"Question {5 - num_seen}?"
    assert 0 < num_seen < 5
    # One pair more would not have fitted.
    pair_tokens = len("\n\n### Instruction:\nQuestion 5?\n\n### Response:\n") + 32 + 1
    assert result.num_prompt_tokens + pair_tokens > 256 - 32
    assert notices[0].startswith("The oldest question and its answer no longer fit into the model's context")
    chat.ask("x" * 130, ignore)
    assert notices[-1].startswith(f"The {num_seen + 1} oldest questions and their answers no longer fit")


def test_an_answer_gets_at_least_a_quarter_of_the_context_or_is_told_how_much(
    make_chat: MakeChat, notices: list[str]
) -> None:
    chat = make_chat("short", max_new_tokens=4000)
    chat.ask("One?", ignore)
    assert notices == []  # more than a quarter, though not 4000
    chat.ask("Two?", ignore)
    assert len(notices) == 1
    around = len("### Instruction:\n\n\n### Response:\n")
    chat.reset()
    assert chat.ask("x" * (200 - around), ignore).num_new_tokens == 56
    assert notices[-1].startswith("At most 56 new tokens")


def test_a_question_that_is_too_long_by_itself_changes_nothing(make_chat: MakeChat, notices: list[str]) -> None:
    chat = make_chat("short", max_new_tokens=32)
    chat.ask("One?", ignore)
    with pytest.raises(InputError, match="reads at most 256"):
        chat.ask("x" * 300, ignore)
    assert notices == []
    assert chat.ask("Two?", ignore).num_prompt_tokens > 100  # with the first question and its answer


@pytest.mark.parametrize(
    ("template", "message"), [("text", "template text has no place"), ("fim", "has no fill-in-the-middle tokens")]
)
def test_templates_without_turns_are_refused_before_the_model_loads(
    models: Path, make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr("dsft.infer.session.load_model", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(ConfigError, match=f"can write several turns: .*{message}"):
        make_chat("greeting", template=template)


def test_a_recorded_template_without_turns_is_refused_too(tmp_path: Path) -> None:
    folder = write_scripted_model(tmp_path / "trained", "Hi!")
    write_summary(folder, str(folder), "text")
    with pytest.raises(ConfigError, match="can write several turns"):
        Chat(InferConfig(model=str(folder), device="cpu"), print)


def test_raw_is_refused() -> None:
    with pytest.raises(ConfigError, match="--raw"):
        Chat(InferConfig(model="nowhere", is_raw=True), print)


@pytest.mark.parametrize(
    ("model", "message"), [("no_system", "no system role"), ("deaf", "leaves the system text out")]
)
def test_a_template_without_a_place_for_a_system_text_is_told(
    make_chat: MakeChat, model: str, message: str, asked: list[list[Turn]]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_chat(model, system="Be brief.")
    chat = make_chat(model)
    with pytest.raises(ConfigError, match=message):
        chat.change_system("Be brief.")
    assert chat.system is None
    assert chat.ask("One?", ignore).text == "Hi!"


def parse_rows(path: Path) -> list[Conversation]:
    rows = [Row(0, where, values) for where, values in read_rows(path, path.name) if isinstance(values, dict)]
    layout = find_layout(rows[0], "files")
    assert layout.name == "messages"
    return [layout.parse(row.values) for row in rows]  # type: ignore[misc]


def test_a_saved_conversation_is_a_row_of_training_data(make_chat: MakeChat, tmp_path: Path) -> None:
    chat = make_chat("greeting", system="Sei kurz: ü.")
    with pytest.raises(InputError, match="nothing to save"):
        chat.save(tmp_path / "x.jsonl")
    chat.ask("One?\nTwo?", ignore)
    saved = chat.save(tmp_path / "x.jsonl")
    assert (saved.num_exchanges, saved.num_cut, saved.has_replaced) == (1, 0, False)
    turns = (Turn("system", "Sei kurz: ü."), Turn("user", "One?\nTwo?"), Turn("assistant", "Hey, du?", True))
    assert parse_rows(tmp_path / "x.jsonl") == [Conversation(turns)]
    assert "ü" in (tmp_path / "x.jsonl").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_conversation_has_one_row_in_a_file(make_chat: MakeChat, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    path.chmod(0o640)
    chat = make_chat("greeting")
    chat.ask("One?", ignore)
    assert not chat.save(path).has_replaced
    chat.ask("Two?", ignore)
    assert chat.save(path).has_replaced
    assert [len(row.turns) for row in parse_rows(path)] == [2, 4]
    chat.undo()
    assert chat.save(path).has_replaced
    chat.reset()
    chat.ask("One?", ignore)
    assert not chat.save(path).has_replaced  # another conversation, though it says the same
    assert [len(row.turns) for row in parse_rows(path)] == [2, 2, 2]
    path.write_text("")
    assert not chat.save(path).has_replaced  # someone took the row away
    assert path.stat().st_mode & 0o777 == 0o640


def test_cut_answers_are_counted(make_chat: MakeChat, tmp_path: Path) -> None:
    chat = make_chat("greeting", max_new_tokens=3)
    chat.ask("One?", ignore)
    assert chat.save(tmp_path / "x.jsonl").num_cut == 1


def test_files_that_are_no_place_for_it_stay_as_they_are(make_chat: MakeChat, tmp_path: Path) -> None:
    chat = make_chat("greeting")
    chat.ask("One?", ignore)
    for name, content in (("x.txt", ""), ("notes.jsonl", "# Notes\n"), ("other.jsonl", '{"text": "a"}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError):
            chat.save(tmp_path / name)
        assert (tmp_path / name).read_text() == content
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="no file"):
        chat.save(tmp_path / "folder.jsonl")
    with pytest.raises(WriteError, match="No such file"):
        chat.save(tmp_path / "nowhere" / "x.jsonl")


def test_a_file_that_can_not_be_written_stays_as_it_is(
    make_chat: MakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = make_chat("greeting")
    chat.ask("One?", ignore)
    path = tmp_path / "x.jsonl"
    chat.save(path)
    before = path.read_bytes()
    chat.ask("Two?", ignore)

    def fill_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fill_disk)
        with pytest.raises(WriteError, match="No space left"):
            chat.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]
    assert chat.save(path).has_replaced
    assert len(json.loads(path.read_text())["messages"]) == 4


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]


def test_chats_that_save_into_one_file_at_once_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"

    def save_rows(number: int) -> None:
        for index in range(25):
            put_row(path, say(f"{number} {index}"), None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save_rows, range(8)))
    assert len(parse_rows(path)) == len(set(path.read_text().splitlines())) == 8 * 25
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_that_lies_beside_a_file_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in (f".x.jsonl.{os.getpid()}", ".x.jsonl", ".x.jsonl.lock"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    put_row(tmp_path / "x.jsonl", say("a"), None)
    assert (tmp_path / "mine").read_text() == "mine"
    assert len(parse_rows(tmp_path / "x.jsonl")) == 1


def test_a_file_that_could_not_be_begun_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fill_disk)
    with pytest.raises(WriteError, match="No space left"):
        put_row(tmp_path / "x.jsonl", say("a"), None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_read_is_no_failure_once_a_row_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_open_folders(monkeypatch)
    put_row(tmp_path / "x.jsonl", say("a"), None)
    assert len(parse_rows(tmp_path / "x.jsonl")) == 1


def test_a_link_stays_one(make_chat: MakeChat, tmp_path: Path) -> None:
    chat = make_chat("greeting")
    chat.ask("One?", ignore)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.jsonl")
    chat.save(tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len(parse_rows(tmp_path / "data.jsonl")) == 1
