"""Files of prompts: what a row asks, how groups fail, what a journal keeps, and answers in the order of the rows."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsft.core.data.examples import Turn
from dsft.core.data.prompts import FimPrompt
from dsft.core.errors import ConfigError, DoesNotFitError, InputError, ModelError, OutputFolderError
from dsft.infer.batch import BatchRequest, run_batch
from dsft.infer.batch_events import BatchListener, BatchProgress, BatchResult
from dsft.infer.batch_groups import GroupedAnswers
from dsft.infer.batch_journal import format_record, journal_path, open_journal
from dsft.infer.batch_rows import AskedRow, RowProblem, read_asked_rows
from dsft.infer.config import InferConfig
from dsft.infer.run import run_infer
from dsft.infer.session import Session
from tests.closed_folders import refuse_to_open_folders
from tests.fim_models import write_fim_model
from tests.scripted_models import write_random_model


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read_one(tmp_path: Path, line: str | bytes) -> AskedRow:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    (row,) = read_asked_rows(path)[0]
    return row


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ("Hi", "Hi"),
        ({"prompt": "Hi "}, "Hi "),
        ({"prompt": "Hi", "completion": "ignored", "output": 3}, "Hi"),
        ({"instruction": "Add", "input": "1, 2", "output": "ignored"}, "Add\n\n1, 2"),
        ({"instruction": "Add", "input": ""}, "Add"),
        ({"prompt": "Hi", "system": "Be brief."}, (Turn("system", "Be brief."), Turn("user", "Hi"))),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "Hi"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                ]
            },
            (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b", is_target=True), Turn("user", "c")),
        ),
        ({"prefix": "a", "suffix": "b"}, FimPrompt("a", "b")),
    ],
)
def test_a_row_asks(tmp_path: Path, row: Any, prompt: Any) -> None:
    read = read_one(tmp_path, json.dumps(row))
    assert (read.prompt, read.problem) == (prompt, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "is neither a JSON object nor a text"),
        ("3", "is neither a JSON object nor a text"),
        ('{"text": "a"}', "has no prompt, instruction or messages"),
        ('{"prompt": ', "broken JSON: Expecting value (column 12)"),
        ('{"prompt": NaN}', "broken JSON: NaN is no JSON"),
        ('{"prompt": "a", "id": -1e999}', "holds a number that is too large: -1e999"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"prompt": "caf\xe9"}', "is not in UTF-8 (byte 0xe9)"),
        ('{"prompt": "\\ud800"}', "prompt holds half a character (a lone surrogate)"),
        ('{"prompt": " "}', "the instruction is empty"),
        ('{"prompt": null}', "prompt is null, not a list of messages"),
        ('{"instruction": 3}', "instruction is a number, not text"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": "a"}', "messages is text, not a list of messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages do not end with a user turn"),
        ('{"messages": [{"role": "user"}]}', "a message in messages has no role and content"),
        ('{"messages": ["a"]}', "a message in messages has no role and content"),
    ],
)
def test_a_row_that_asks_nothing_says_why(tmp_path: Path, line: str | bytes, reason: str) -> None:
    read = read_one(tmp_path, line)
    assert (read.prompt, read.problem) == (None, RowProblem("BadRow", reason))


def test_lines_are_counted_with_blank_ones_and_ids_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 7, "prompt": "a"}\r\n\n  \n{"id": {"x": null}, "prompt": ""}\n"b"')
    rows, _ = read_asked_rows(path)
    assert [row.tags for row in rows] == [{"line": 1, "id": 7}, {"line": 4, "id": {"x": None}}, {"line": 5}]
    assert [row.prompt for row in rows] == ["a", None, "b"]


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b'  {"prompt": 1}\r\n\nb\n')
    assert [(row.line, row.prompt) for row in read_asked_rows(path)[0]] == [(1, '  {"prompt": 1}'), (3, "b")]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("rows.jsonl", "\n \n", InputError, "holds no prompts"),
        ("rows.jsonl", None, InputError, "can't be read: No such file"),
        ("rows.csv", "a", ConfigError, "is neither"),
        (".", None, ConfigError, "is a folder"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(
    tmp_path: Path, name: str, content: str | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_asked_rows(tmp_path / name)


def test_a_pipe_holds_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=('{"prompt": "a"}\n"b"\n',))
    writer.start()
    rows, _ = read_asked_rows(path)
    writer.join()
    assert [row.prompt for row in rows] == ["a", "b"]


class Groups:
    """A stand-in for the model, which answers groups but for those that it is told to fail."""

    def __init__(self, fail: Callable[[list[int]], Exception | None], answered_before: int = 0) -> None:
        self.fail = fail
        self.answered_before = answered_before
        self.tried: list[list[int]] = []
        self.answered: list[int] = []
        self.failed: list[int] = []
        self.notices: list[str] = []

    def answer_group(self, group: Sequence[AskedRow], on_answered: Callable[[AskedRow], None]) -> None:
        lines = [row.line for row in group]
        self.tried.append(lines)
        error = self.fail(lines)
        for row in group[: self.answered_before] if error else group:
            self.answered.append(row.line)
            on_answered(row)
        if error:
            raise error

    def run(self, num_rows: int, size: int, *, has_answered: bool = False) -> None:
        rows = [AskedRow(line, {"line": line}, "x", None) for line in range(1, num_rows + 1)]
        answers = GroupedAnswers(
            self.answer_group,
            lambda row, _: self.failed.append(row.line),
            self.notices.append,
            has_answered=has_answered,
        )
        answers.answer(rows, size)
        answers.finish()


def test_a_group_that_needs_too_much_memory_is_halved_once_for_all() -> None:
    groups = Groups(lambda lines: DoesNotFitError("full") if len(lines) > 2 else None)
    groups.run(9, 8)
    assert groups.tried == [[*range(1, 9)], [1, 2, 3, 4], [1, 2], [3, 4], [5, 6], [7, 8], [9]]
    assert groups.answered == [*range(1, 10)]
    assert len(groups.notices) == 1


def test_rows_answered_before_the_memory_ran_out_are_not_asked_again() -> None:
    groups = Groups(lambda lines: DoesNotFitError("full") if len(lines) > 3 else None, answered_before=2)
    groups.run(4, 4)
    assert groups.tried == [[1, 2, 3, 4], [3, 4]]
    assert groups.answered == [1, 2, 3, 4]


def test_only_the_row_that_does_not_fit_alone_fails() -> None:
    groups = Groups(lambda lines: DoesNotFitError("full") if 1 in lines else None)
    groups.run(5, 4)
    assert (groups.failed, groups.answered) == ([1], [2, 3, 4, 5])


def test_a_row_with_nan_is_found_and_later_groups_stay_whole() -> None:
    groups = Groups(lambda lines: ModelError("NaN") if 7 in lines else None)
    groups.run(12, 4)
    assert (groups.failed, groups.answered) == ([7], [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12])
    assert groups.tried[-1] == [9, 10, 11, 12]


@pytest.mark.parametrize("bad", [{1}, {1, 2, 3, 4}, {1, 8}])
def test_the_longest_row_with_nan_does_not_end_it(bad: set[int]) -> None:
    groups = Groups(lambda lines: ModelError("NaN") if bad & set(lines) else None)
    groups.run(8, 4)
    assert (groups.failed, groups.answered) == (sorted(bad), [line for line in range(1, 9) if line not in bad])


def test_a_model_that_gives_nan_for_every_row_ends_it_and_blames_no_row() -> None:
    groups = Groups(lambda _: ModelError("NaN"))
    with pytest.raises(ModelError, match="NaN"):
        groups.run(4, 4)
    assert groups.tried == [[1, 2, 3, 4], [1, 2], [1], [2], [3, 4], [3], [4]]
    assert groups.failed == []


def test_a_model_that_answered_before_is_not_blamed_for_the_last_rows() -> None:
    groups = Groups(lambda _: ModelError("NaN"))
    groups.run(2, 1, has_answered=True)
    assert groups.failed == [1, 2]


HEADER = {"settings": {"model": "m", "stop": ["a"], "top_p": None}, "rows": "digest", "seed": None}


def open_one(output: Path, notices: list[str] | None = None, **changes: Any) -> Any:
    return open_journal(output, HEADER | changes, (notices if notices is not None else []).append)


def test_a_journal_keeps_answers_and_writes_them_in_order(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    with open_one(output) as journal:
        journal.append({"line": 3, "text": "ü", "id": "\ud800"})
        journal.append({"line": 1, "text": "a"})
    with open_one(output) as journal:
        assert journal.lines == {1, 3}
        journal.append({"line": 2, "text": "b"})
        journal.finish([1, 2, {"line": 9, "error": "x"}, 3])
    lines = output.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 2, 9, 3]
    assert json.loads(lines[3]) == {"line": 3, "text": "ü", "id": "\ud800"}
    assert list(tmp_path.iterdir()) == [output]


def test_what_fails_once_the_output_is_there_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    output = tmp_path / "answers.jsonl"
    with open_one(output) as journal:
        journal.append({"line": 1, "text": "a"})
        journal_path(output).chmod(0o640)
        with monkeypatch.context() as patch:
            refuse_to_open_folders(patch)
            patch.setattr(Path, "unlink", refuse)
            journal.finish([1])
    assert output.read_text() == '{"line": 1, "text": "a"}\n'
    assert output.stat().st_mode & 0o777 == 0o640


def test_a_record_is_readable_json() -> None:
    assert format_record({"text": "ü世\u2028"}) == '{"text": "ü世\u2028"}'


@pytest.mark.parametrize("torn", ['{"line": 5, "te', "\0\0\0\0", '{"line": 5, "text": "a"}', '{"text": "a"}\n', "x\n"])
def test_a_torn_end_is_cut_off_and_told(tmp_path: Path, torn: str) -> None:
    output = tmp_path / "answers.jsonl"
    with open_one(output) as journal:
        journal.append({"line": 3, "text": "c"})
    with journal_path(output).open("a") as file:
        file.write(torn)
    notices: list[str] = []
    with open_one(output, notices) as journal:
        assert journal.lines == {3}
        journal.append({"line": 5, "text": "e"})
    assert "no whole answer" in notices[0]
    with open_one(output) as journal:
        assert journal.lines == {3, 5}


@pytest.mark.parametrize("content", ["", '{"dsft_ba'])
def test_a_journal_that_was_hardly_begun_is_begun_anew(tmp_path: Path, content: str) -> None:
    output = tmp_path / "answers.jsonl"
    journal_path(output).write_text(content)
    with open_one(output) as journal:
        journal.append({"line": 3})
    with open_one(output) as journal:
        assert journal.lines == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": HEADER["settings"] | {"top_p": 0.5}}, "other settings: top_p was null and is 0.5."),
        ({"settings": HEADER["settings"] | {"fingerprint": "x"}}, "the model's weights have changed"),
        ({"rows": "other"}, "another version of the prompts"),
    ],
)
def test_a_journal_of_another_run_is_kept_and_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    output = tmp_path / "answers.jsonl"
    with open_one(output) as journal:
        journal.append({"line": 3})
    content = journal_path(output).read_bytes()
    with pytest.raises(InputError, match=message) as caught, open_one(output, **changes):
        pass
    assert f"rm {journal_path(output)}" in caught.value.fix
    assert journal_path(output).read_bytes() == content


def test_another_file_in_the_journal_s_place_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    journal_path(output).write_text('{"settings": 1}\nmine\n')
    with pytest.raises(InputError, match="is no journal"), open_one(output):
        pass
    assert journal_path(output).read_text() == '{"settings": 1}\nmine\n'


def test_the_seed_of_the_first_process_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    with open_one(output, seed=7) as journal:
        journal.append({"line": 3})
    with open_one(output, seed=8) as journal:
        assert journal.header["seed"] == 7


def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    with open_one(output) as journal:
        with (
            pytest.raises(OutputFolderError, match=r"Another dsft command is writing .*answers\.jsonl"),
            open_one(output),
        ):
            pass
        journal.append({"line": 3})
    with open_one(output) as journal:
        assert journal.lines == {3}


def test_a_journal_without_answers_goes(tmp_path: Path) -> None:
    with open_one(tmp_path / "answers.jsonl"):
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "random", max_position_embeddings=256)


class Transcript:
    """A batch and what was told of it; Ctrl-C comes after some answers, if that is asked for."""

    def __init__(self, model: Path, break_off_after: int | None = None, **settings: Any) -> None:
        self.config = InferConfig(**({"model": str(model), "device": "cpu", "max_new_tokens": 12} | settings))
        self.break_off_after = break_off_after
        self.notices: list[str] = []
        self.bad_rows: list[str] = []
        self.progress: list[BatchProgress] = []
        self.records: list[Mapping[str, Any]] = []
        self.order: list[str] = []

    def run(self, file: Path, output: Path | None = None, batch_size: int | None = None) -> BatchResult:
        listener = BatchListener(self.notices.append, self.bad_rows.append, self.take_progress, self.take_record)
        return run_batch(self.config, BatchRequest(file, output, batch_size), listener)

    def take_progress(self, progress: BatchProgress) -> None:
        self.progress.append(progress)
        self.order.append(f"{progress.num_answered} answered")
        if progress.num_answered == self.break_off_after:
            raise KeyboardInterrupt

    def take_record(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        self.order.append(f"line {record['line']}")


def read_answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_get_the_answers_that_they_get_alone_in_their_order(tmp_path: Path, model: Path) -> None:
    prompts = ["short", "a much longer prompt than that", "middling long", "short", "x"]
    file = write_rows(tmp_path / "rows.jsonl", *({"prompt": prompt, "id": prompt[:1]} for prompt in prompts))
    transcript = Transcript(model)
    result = transcript.run(file, tmp_path / "out.jsonl", batch_size=2)
    answers = read_answers(tmp_path / "out.jsonl")
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        alone = run_infer(transcript.config, prompt, lambda _: None, lambda _: None)
        assert answer == {
            "line": number,
            "id": prompt[:1],
            "text": alone.text,
            "stop_reason": alone.stop_reason,
            "num_prompt_tokens": alone.num_prompt_tokens,
            "num_new_tokens": alone.num_new_tokens,
        }
    assert (result.num_rows, result.num_answered, result.num_failed, result.num_resumed) == (5, 5, 0, 0)
    assert result.num_new_tokens == sum(answer["num_new_tokens"] for answer in answers)
    assert [progress.num_done for progress in transcript.progress] == [0, 1, 2, 3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_the_longest_rows_go_first_and_like_lengths_together(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[int]] = []
    answer_all = Session.answer_all

    def spy(self: Session, prompts: Any, *args: Any, **kwargs: Any) -> None:
        groups.append([len(prompt.token_ids) for prompt in prompts])
        answer_all(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Session, "answer_all", spy)
    file = write_rows(tmp_path / "rows.jsonl", *("x" * length for length in (1, 30, 2, 20, 3)))
    Transcript(model, is_raw=True).run(file, tmp_path / "out.jsonl", batch_size=2)
    assert groups == [[30, 20], [3, 2], [1]]


def test_without_a_file_records_come_in_order_as_soon_as_it_allows(tmp_path: Path, model: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", {"nothing": 1}, "xxx", "x", "xx", {"prompt": ""})
    transcript = Transcript(model)
    transcript.run(file, batch_size=1)  # answers line 2, then 4, then 3
    assert transcript.order == [
        "0 answered", "line 1", "line 2", "1 answered", "2 answered", "line 3", "line 4", "line 5", "3 answered"
    ]  # fmt: skip
    assert ["error" in record for record in transcript.records] == [True, False, False, False, True]


def test_without_a_file_the_first_groups_do_not_wait_for_the_longest_row(tmp_path: Path, model: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *(["x"] * 8), "x" * 50)
    transcript = Transcript(model)
    transcript.run(file, batch_size=1)
    assert transcript.order.index("line 1") < transcript.order.index("2 answered")


def test_bad_rows_are_told_and_stand_among_the_answers(tmp_path: Path, model: Path) -> None:
    rows = ["a", {"x": 1}, "b" * 300, {"id": 4, "prompt": 5}]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    transcript = Transcript(model)
    result = transcript.run(file, tmp_path / "out.jsonl")
    assert (result.num_answered, result.num_failed) == (1, 3)
    assert [sentence.removeprefix(str(file)).split(" ")[0] for sentence in transcript.bad_rows] == [":2:", ":3:", ":4:"]
    answers = read_answers(tmp_path / "out.jsonl")
    assert [answer.get("error", {}).get("kind") for answer in answers] == [
        None,
        "BadRow",
        "PromptTooLongError",
        "BadRow",
    ]
    assert answers[3]["id"] == 4
    assert answers[2]["error"]["fix"] == "Shorten the prompt."


def test_many_bad_rows_are_not_told_one_by_one(tmp_path: Path, model: Path) -> None:
    transcript = Transcript(model)
    transcript.run(write_rows(tmp_path / "rows.jsonl", "a", *([{}] * 30)), tmp_path / "out.jsonl")
    assert len(transcript.bad_rows) == 21
    assert transcript.bad_rows[-1].startswith("10 more rows of ")
    assert len(read_answers(tmp_path / "out.jsonl")) == 31


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{}, {"x": 1}], {}, "has no row that can be asked; the first: .*:1: has no prompt"),
        ([{"prompt": "a", "system": "s"}], {"is_raw": True}, "--raw takes a prompt alone"),
        ([{"prompt": "a", "system": "s"}], {"system": "t"}, "a system text of its own beside that of --system"),
        ([{"prefix": "a", "suffix": "b"}], {}, "fill-in-the-middle tokens"),
    ],
)
def test_a_file_without_any_row_to_ask_leaves_nothing(
    tmp_path: Path, model: Path, rows: list[Any], settings: dict[str, Any], message: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(InputError, match=message):
        Transcript(model, **settings).run(file, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [file]


def test_gaps_are_filled_too(tmp_path: Path) -> None:
    model = write_fim_model(tmp_path / "fim", "xy")
    transcript = Transcript(model)
    transcript.run(write_rows(tmp_path / "rows.jsonl", {"prefix": "a", "suffix": "b"}))
    assert transcript.records[0]["text"] == "xy"


def test_an_output_that_is_there_stays(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        Transcript(model).run(write_rows(tmp_path / "rows.jsonl", "a"), output)
    assert output.read_text() == "mine"


@pytest.mark.parametrize("num_before", [1, 3, 5])
def test_a_batch_that_broke_off_is_gone_on_with(tmp_path: Path, model: Path, num_before: int) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *("x" * length for length in (5, 3, 30, 2, 9)), {})
    Transcript(model).run(file, tmp_path / "whole.jsonl", batch_size=3)
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Transcript(model, break_off_after=num_before).run(file, output, batch_size=2)
    assert not output.exists()
    going_on = Transcript(model)
    result = going_on.run(file, output, batch_size=3)
    assert (result.num_resumed, result.num_answered, result.num_failed) == (num_before, 5, 1)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal_path(output).exists()


def test_a_batch_whose_last_row_has_nan_can_be_finished(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", "x", "xxx", "xx")
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Transcript(model, break_off_after=2).run(file, output, batch_size=1)

    def fail(*_: Any, **__: Any) -> None:
        raise ModelError("The outputs are NaN.")

    monkeypatch.setattr(Session, "answer_all", fail)
    result = Transcript(model).run(file, output)
    assert (result.num_resumed, result.num_failed) == (2, 1)
    assert [answer.get("error", {}).get("kind") for answer in read_answers(output)] == ["ModelError", None, None]


def test_a_model_that_never_answers_leaves_no_output(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ModelError("The outputs are NaN.")

    monkeypatch.setattr(Session, "answer_all", fail)
    file = write_rows(tmp_path / "rows.jsonl", "x", "xxx", "xx")
    transcript = Transcript(model)
    for output in (tmp_path / "out.jsonl", None):
        with pytest.raises(ModelError, match="NaN"):
            transcript.run(file, output, batch_size=1)
    assert (transcript.bad_rows, transcript.records) == ([], [])
    assert list(tmp_path.iterdir()) == [file]


def test_a_retrained_model_of_the_same_name_is_not_gone_on_with(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", seed=1)
    file = write_rows(tmp_path / "rows.jsonl", "a", "b")
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Transcript(model, break_off_after=1).run(file, output, batch_size=1)
    write_random_model(model, seed=2)
    with pytest.raises(InputError, match="the model's weights have changed"):
        Transcript(model).run(file, output)


def test_the_same_prompt_in_several_groups_draws_other_numbers_and_the_seed_repeats_them(
    tmp_path: Path, model: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *(["same"] * 4))
    texts = []
    for _ in range(2):
        transcript = Transcript(model, temperature=1.0, seed=5)
        assert transcript.run(file, batch_size=1).seed == 5
        texts.append([record["text"] for record in transcript.records])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_a_larger_batch_size_than_the_model_takes_is_told(tmp_path: Path, model: Path) -> None:
    transcript = Transcript(model)
    transcript.run(write_rows(tmp_path / "rows.jsonl", "a"), batch_size=1000)
    assert any(notice.startswith("--batch-size 1000: this model answers at most") for notice in transcript.notices)
