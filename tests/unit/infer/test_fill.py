"""Gaps: DeepSeek-Coder's layout to the token, what is cut from long texts, and files replaced or left alone."""

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsft.core.data.prompts import FimPrompt
from dsft.core.errors import DataError, InputError, WriteError
from dsft.core.models.find_run import BaseName, ModelChoice
from dsft.core.models.source import ModelSource
from dsft.infer.config import InferConfig
from dsft.infer.fill import FillRequest, FillResult, run_fill
from dsft.infer.marked_file import MAX_BYTES, read_marked_file
from dsft.infer.prompts import PromptEncoder, PromptTooLongError
from tests.closed_folders import refuse_to_open_folders
from tests.fim_models import FIM_BEGIN, FIM_END, FIM_HOLE, write_fim_model
from tests.scripted_models import make_tokenizer, write_scripted_model

BOS, FIM_BEGIN_ID, FIM_HOLE_ID, FIM_END_ID = 32013, 32016, 32015, 32017
NUM_FUNCTIONS = 40


@pytest.fixture(scope="module")
def deepseek(shared: Path) -> Path:
    folder = shared / "assets" / "deepseek-coder-6.7b"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the shared material has no tokenizer of DeepSeek-Coder")
    return folder


@pytest.fixture(scope="module")
def raw_tokenizer(deepseek: Path) -> Tokenizer:
    return Tokenizer.from_file(str(deepseek / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoder(deepseek: Path) -> PromptEncoder:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(deepseek)
    return make_encoder(tokenizer, json.loads((deepseek / "config.json").read_text())["max_position_embeddings"])


def make_encoder(tokenizer: PreTrainedTokenizerFast, num_positions: int | None) -> PromptEncoder:
    choice = ModelChoice("m", None, (BaseName("m", None, "--model"),), None)
    config = {} if num_positions is None else {"max_position_embeddings": num_positions}
    return PromptEncoder(InferConfig(), choice, ModelSource("m", "m", None, None, config), tokenizer, lambda _: None)


def read_functions(shared: Path) -> list[str]:
    path = shared / "data" / "humaneval-python.jsonl"
    if not path.is_file():
        pytest.skip("the shared material has no HumanEval")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] + row["canonical_solution"] for row in rows[:NUM_FUNCTIONS]]


def cut_out_middles(text: str) -> Iterator[tuple[int, int]]:
    """Yield the ends of middles: lines, words, halves of words, indentation, all to the end, all from the start."""
    half = len(text) // 2
    line = text.index("\n", half) if "\n" in text[half:] else half
    indent = text.index("    ", line) if "    " in text[line:] else line
    blank = text.index(" ", half // 2)
    word = next(place for place in range(half // 2, len(text) - 2) if text[place : place + 3].isalpha())
    yield line, len(text)  # nothing behind the gap
    yield 0, line  # nothing before it
    yield line, line + 1  # a line end alone
    yield indent + 2, min(len(text), indent + 9)  # within an indentation
    yield blank, blank + 5  # at a blank
    yield blank + 1, blank + 5  # behind it
    yield word + 1, word + 2  # inside a word
    yield half, half  # nothing is missing
    yield len(text) // 3, 2 * len(text) // 3


def test_functions_with_hidden_middles_have_deepseek_coders_layout(
    shared: Path, encoder: PromptEncoder, raw_tokenizer: Tokenizer
) -> None:
    num_cuts = 0
    for text in read_functions(shared):
        for start, end in cut_out_middles(text):
            prefix, suffix = text[:start], text[end:]
            parts = [raw_tokenizer.encode(part, add_special_tokens=False).ids for part in (prefix, suffix)]
            expected = [BOS, FIM_BEGIN_ID, *parts[0], FIM_HOLE_ID, *parts[1], FIM_END_ID]
            assert encoder.encode(FimPrompt(prefix, suffix)).token_ids == expected
            assert encoder.encode_gap(FimPrompt(prefix, suffix), 512)[0].token_ids == expected
            assert raw_tokenizer.decode(parts[0]) + text[start:end] + raw_tokenizer.decode(parts[1]) == text
            num_cuts += 1
    assert num_cuts == 9 * NUM_FUNCTIONS


def test_an_answer_ends_at_the_end_of_sentence_token(encoder: PromptEncoder) -> None:
    assert encoder.encode(FimPrompt("a", "b")).stop_token_ids == [32014]


@pytest.mark.parametrize("token", [FIM_HOLE, FIM_BEGIN, FIM_END, "<|EOT|>", "<｜end▁of▁sentence｜>"])
def test_a_control_token_spelled_in_code_stays_text(
    encoder: PromptEncoder, raw_tokenizer: Tokenizer, token: str
) -> None:
    prefix, suffix = f'MARK = "{token}"\nx = ', f"\nprint('{token}')\n"
    assert any(id_ >= BOS for id_ in raw_tokenizer.encode(prefix, add_special_tokens=False).ids)  # else no test
    token_ids = encoder.encode(FimPrompt(prefix, suffix)).token_ids
    hole = token_ids.index(FIM_HOLE_ID)
    assert token_ids[:2] == [BOS, FIM_BEGIN_ID] and token_ids[-1] == FIM_END_ID
    sides = token_ids[2:hole], token_ids[hole + 1 : -1]
    assert max(max(side) for side in sides) < BOS
    assert tuple(map(raw_tokenizer.decode, sides)) == (prefix, suffix)


@pytest.fixture(scope="module")
def byte_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], PromptEncoder]:
    folder = write_fim_model(tmp_path_factory.mktemp("bytes"), "x")
    return lambda num_positions: make_encoder(AutoTokenizer.from_pretrained(folder), num_positions)


def decode(encoder: PromptEncoder, token_ids: list[int]) -> str:
    text: str = encoder._tokenizer.decode(token_ids)
    return text


def test_a_long_text_loses_what_is_farthest_from_the_gap(
    byte_encoder: Callable[[int | None], PromptEncoder],
) -> None:
    encoder = byte_encoder(64)
    prefix, suffix = "".join(map(chr, range(48, 108))), "z" * 15 + "y" * 15  # 60 and 30 tokens, and 3 around them
    encoded, num_cut = encoder.encode_gap(FimPrompt(prefix, suffix), 10)
    assert num_cut == 93 - 54
    assert decode(encoder, encoded.token_ids) == f"{FIM_BEGIN}{prefix[26:]}{FIM_HOLE}{suffix[:17]}{FIM_END}"
    assert encoded.num_room == 10


def test_half_of_the_context_is_enough_for_the_answer(byte_encoder: Callable[[int | None], PromptEncoder]) -> None:
    encoded, num_cut = byte_encoder(64).encode_gap(FimPrompt("a" * 40, ""), 512)
    assert (num_cut, encoded.num_room) == (43 - 32, 32)


@pytest.mark.parametrize(("num_positions", "num_wanted"), [(None, 10), (64, 10), (53, 10)])
def test_a_text_that_fits_is_not_cut(
    byte_encoder: Callable[[int | None], PromptEncoder], num_positions: int | None, num_wanted: int
) -> None:
    encoder = byte_encoder(num_positions)
    prompt = FimPrompt("a" * 20, "b" * 20)
    encoded, num_cut = encoder.encode_gap(prompt, num_wanted)
    assert num_cut == 0
    assert encoded == encoder.encode(prompt)


def test_a_context_without_room_for_any_text_is_told(byte_encoder: Callable[[int | None], PromptEncoder]) -> None:
    with pytest.raises(PromptTooLongError):
        byte_encoder(4).encode_gap(FimPrompt("abc", ""), 1)


def test_a_tokenizer_without_the_tokens_is_told() -> None:
    with pytest.raises(DataError, match=r"no fill-in-the-middle tokens.*Take a model that was trained for it"):
        make_encoder(make_tokenizer(), 64).encode_gap(FimPrompt("a", "b"), 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\n", "has no <FILL>\\."),
        (b"a\n<Fill>\n", "has no <FILL> \\(line 2 has it in other letters\\)"),
        (b"<FILL>\nx\n<FILL>", "has 2 marks <FILL>, on lines 1, 3"),
        (b"\n<FILL><FILL>", "has 2 marks <FILL>, on line 2"),
        (b"<FILL>\n\n caf\xe9", ":3 is not in UTF-8 \\(byte 0xe9\\)"),
        (b"<FILL>" + b"a" * MAX_BYTES, "larger than 16 MiB"),
    ],
)
def test_a_file_without_exactly_one_mark_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_marked_file(path)


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_marked_file(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "text", "prompt", "expected"),
    [
        (b"a\r\n<FILL>\r\nb", "1\n2", FimPrompt("a\n", "\nb"), b"a\r\n1\r\n2\r\nb"),
        (b"a\r\n<FILL>\r\nb", "1\r\n2", FimPrompt("a\n", "\nb"), b"a\r\n1\r\n2\r\nb"),
        (b"a\r\n<FILL>\nb", "1\n2", FimPrompt("a\r\n", "\nb"), b"a\r\n1\n2\nb"),
        (b"\xef\xbb\xbfa<FILL>b", "1\n", FimPrompt("a", "b"), b"\xef\xbb\xbfa1\nb"),
        ("é<FILL>\u2028".encode(), "", FimPrompt("é", "\u2028"), "é\u2028".encode()),
    ],
)
def test_line_ends_and_byte_order_mark_stay(
    tmp_path: Path, data: bytes, text: str, prompt: FimPrompt, expected: bytes
) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(data)
    marked = read_marked_file(path)
    assert marked.prompt == prompt
    marked.replace_mark(marked.fit(text))
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_mode_and_link_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "x.py", tmp_path / "link.py"
    path.write_text("<FILL>")
    path.chmod(0o751)
    link.symlink_to("x.py")
    marked = read_marked_file(link)
    marked.check_replaceable()
    marked.replace_mark("y")
    assert link.is_symlink()
    assert path.read_text() == "y"
    assert stat.S_IMODE(path.stat().st_mode) == 0o751


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owner_and_group_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("<FILL>")
    os.chown(path, 1234, 4321)
    read_marked_file(path).replace_mark("y")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


def test_a_folder_that_can_not_be_read_is_no_failure_once_the_mark_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.py"
    path.write_text("<FILL>")
    refuse_to_open_folders(monkeypatch)
    read_marked_file(path).replace_mark("y")
    assert path.read_text() == "y"


def test_an_owner_that_can_t_be_kept_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "x.py"
    path.write_text("<FILL>")
    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(InputError, match="can't be replaced as it is: Operation not permitted"):
        read_marked_file(path).check_replaceable()
    with pytest.raises(WriteError, match="Operation not permitted"):
        read_marked_file(path).replace_mark("y")
    assert path.read_text() == "<FILL>"
    assert list(tmp_path.iterdir()) == [path]


def test_hard_links_are_not_parted(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("<FILL>")
    (tmp_path / "y.py").hardlink_to(path)
    with pytest.raises(InputError, match="2 names \\(hard links\\)"):
        read_marked_file(path).check_replaceable()


def test_a_file_changed_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("<FILL>")
    marked = read_marked_file(path)
    path.write_text("<FILL> and more")
    with pytest.raises(WriteError, match="was changed while its gap was being filled"):
        marked.replace_mark("y")
    assert path.read_text() == "<FILL> and more"
    path.unlink()
    with pytest.raises(WriteError, match="No such file"):
        marked.replace_mark("y")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_fim_model(folder / "short", "xy\n12")
    write_fim_model(folder / "empty", "")
    write_fim_model(folder / "small", "xy", max_position_embeddings=32)
    write_scripted_model(folder / "other", "abc")
    return folder


def run(model: Path, request: FillRequest, notices: list[str] | None = None, **settings: int) -> FillResult:
    config = InferConfig(model=str(model), device="cpu", **settings)
    return run_fill(config, request, lambda _: None, (notices if notices is not None else []).append)


def test_two_texts_are_filled(models: Path) -> None:
    result = run(models / "short", FillRequest("a", "b"))
    assert (result.answer.text, result.answer.template) == ("xy\n12", "fim")
    assert (result.file, result.is_written, result.problem) == (None, False, None)


def test_an_empty_answer_takes_the_mark_away(models: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a<FILL>b")
    assert run(models / "empty", FillRequest(file=tmp_path / "x", in_place=True)).is_written
    assert (tmp_path / "x").read_text() == "ab"


def test_only_the_model_s_view_of_a_long_file_is_cut(models: Path, tmp_path: Path) -> None:
    notices: list[str] = []
    (tmp_path / "x").write_text("a" * 50 + "<FILL>" + "b" * 50)
    result = run(models / "small", FillRequest(file=tmp_path / "x", in_place=True), notices, max_new_tokens=5)
    assert (tmp_path / "x").read_text() == "a" * 50 + "xy" + "b" * 50
    assert result.answer.num_prompt_tokens == 27
    assert any("does not see the 76 tokens farthest from the gap" in notice for notice in notices)


@pytest.mark.parametrize(
    ("num_positions", "limit", "reason"), [(4096, 4, "--max-new-tokens"), (32, 9999, "context was full")]
)
def test_a_cut_answer_is_not_written_back(tmp_path: Path, num_positions: int, limit: int, reason: str) -> None:
    model = write_fim_model(tmp_path / "model", "xyz", is_endless=True, max_position_embeddings=num_positions)
    (tmp_path / "x").write_text("a<FILL>b")
    notices: list[str] = []
    result = run(model, FillRequest(file=tmp_path / "x", in_place=True), notices, max_new_tokens=limit)
    assert any(notice.startswith("At most 27 new tokens") for notice in notices) == (num_positions == 32)
    assert not result.is_written
    assert isinstance(result.problem, WriteError)
    assert reason in result.problem.found
    assert result.answer.text.startswith("xyzx")
    assert (tmp_path / "x").read_text() == "a<FILL>b"


def test_a_model_without_the_tokens_is_told(models: Path) -> None:
    with pytest.raises(DataError, match=r"other has no fill-in-the-middle tokens that are known.*DeepSeek-Coder"):
        run(models / "other", FillRequest("a", "b"))


def test_a_gap_in_nothing_is_refused_before_any_model_is_looked_for() -> None:
    with pytest.raises(InputError, match="The prompt is empty"):
        run(Path("nowhere"), FillRequest(" ", "\n"))


def test_a_write_protected_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.py"
    path.write_text("<FILL>")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anything
    with pytest.raises(InputError, match="is write-protected"):
        read_marked_file(path).check_replaceable()


def test_a_shell_s_pipe_is_read_but_not_replaced() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"a<FILL>b")
    os.close(write_end)
    marked = read_marked_file(Path(f"/dev/fd/{read_end}"))
    assert marked.prompt == FimPrompt("a", "b")
    with pytest.raises(InputError, match="no regular file"):
        marked.check_replaceable()
    os.close(read_end)


def test_a_named_pipe_is_read_but_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)  # so that neither end waits for the other
    os.write(descriptor, b"a<FILL>b")
    reader = threading.Thread(target=lambda: (time.sleep(0.2), os.close(descriptor)))
    reader.start()
    marked = read_marked_file(path)
    reader.join()
    assert marked.prompt == FimPrompt("a", "b")
    with pytest.raises(InputError, match="no regular file"):
        marked.check_replaceable()
