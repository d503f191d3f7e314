"""A session answers as often as one likes: each answer is what a fresh one would give, whatever was before."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from dsft.core.errors import DoesNotFitError
from dsft.infer.config import InferConfig
from dsft.infer.result import InferResult
from dsft.infer.session import Session
from tests.scripted_models import make_tokenizer, write_adapter, write_random_model, write_scripted_model

PROMPTS = ("Sort a list.", "x", "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n", "What is a pointer?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_random_model(folder / "random")
    write_adapter(folder / "adapter", folder / "random")
    return folder


def open_session(model: Path, **settings: Any) -> Session:
    return Session(InferConfig(model=str(model), device="cpu", **({"max_new_tokens": 24} | settings)), lambda _: None)


def ask(
    session: Session, prompt: str, on_text: Callable[[str], None] = lambda _: None, *, use_adapter: bool = True
) -> str:
    return session.answer(session.encode(prompt), on_text, use_adapter=use_adapter).text


def raise_at(num_pieces: int, error: type[BaseException]) -> Callable[[str], None]:
    pieces: list[str] = []

    def receive(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == num_pieces:
            raise error

    return receive


@pytest.mark.parametrize("is_speculating", [False, True])
def test_every_answer_is_what_a_fresh_session_gives(folder: Path, is_speculating: bool) -> None:
    session = open_session(folder / "adapter", is_speculating=is_speculating)
    fresh = [ask(open_session(folder / "adapter"), prompt) for prompt in PROMPTS]
    assert len(set(fresh)) == len(PROMPTS)
    assert [ask(session, prompt) for prompt in (*PROMPTS, *PROMPTS)] == [*fresh, *fresh]


def test_a_conversation_is_read_on_from_where_it_was(folder: Path) -> None:
    session = open_session(folder / "random", is_raw=True)
    decoder = session.load()
    text = "def add(a, b):\n"
    for _ in range(3):
        text += ask(session, text)
        assert ask(session, text) == ask(open_session(folder / "random", is_raw=True), text)
    assert session.load() is decoder


@pytest.mark.parametrize("is_speculating", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_answer_after_a_broken_one_is_right(folder: Path, error: type[BaseException], is_speculating: bool) -> None:
    session = open_session(folder / "adapter", is_speculating=is_speculating)
    expected = ask(open_session(folder / "adapter"), PROMPTS[0])
    for num_pieces in (1, 2, 5):
        with pytest.raises(error):
            ask(session, PROMPTS[0], raise_at(num_pieces, error))
        assert ask(session, PROMPTS[0]) == expected


def test_without_the_adapter_the_base_alone_answers_and_then_the_adapter_again(folder: Path) -> None:
    session = open_session(folder / "adapter")
    for prompt in PROMPTS:
        adapted = ask(open_session(folder / "adapter"), prompt)
        base = ask(open_session(folder / "random", template="instruction"), prompt)
        assert adapted != base
        assert ask(session, prompt) == adapted
        assert ask(session, prompt, use_adapter=False) == base
        assert ask(session, prompt) == adapted


def test_a_broken_answer_of_the_base_leaves_the_adapter_on(folder: Path) -> None:
    session = open_session(folder / "adapter")
    expected = ask(open_session(folder / "adapter"), PROMPTS[0])
    with pytest.raises(KeyboardInterrupt):
        ask(session, PROMPTS[0], raise_at(3, KeyboardInterrupt), use_adapter=False)
    assert ask(session, PROMPTS[0]) == expected


def test_a_pipe_that_closes_at_the_bases_last_word_leaves_the_adapter_on(folder: Path) -> None:
    whole = ask(open_session(folder / "random", template="instruction"), PROMPTS[0])
    settings = {"stop": (whole[-1] + "!",)}  # holds the last character back until the answer has ended
    session = open_session(folder / "adapter", **settings)
    pieces: list[str] = []

    def receive(piece: str) -> None:
        pieces.append(piece)
        if "".join(pieces) == whole:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        ask(session, PROMPTS[0], receive, use_adapter=False)
    assert ask(session, PROMPTS[0]) == ask(open_session(folder / "adapter", **settings), PROMPTS[0])


@pytest.mark.parametrize("use_adapter", [True, False])
def test_several_prompts_at_once_are_answered_as_each_alone(folder: Path, use_adapter: bool) -> None:
    alone, together = open_session(folder / "adapter"), open_session(folder / "adapter")
    results: dict[int, InferResult] = {}

    def receive(index: int, result: InferResult) -> None:
        assert index not in results
        results[index] = result

    together.answer_all([together.encode(prompt) for prompt in PROMPTS], receive, use_adapter=use_adapter)
    for index, prompt in enumerate(PROMPTS):
        expected = alone.answer(alone.encode(prompt), lambda _: None, use_adapter=use_adapter)
        found = results[index]
        assert (found.text, found.num_prompt_tokens, found.num_new_tokens, found.stop_reason) == (
            expected.text,
            expected.num_prompt_tokens,
            expected.num_new_tokens,
            expected.stop_reason,
        )
    assert ask(together, PROMPTS[0]) == ask(alone, PROMPTS[0])


def test_answers_of_several_come_as_they_end_each_with_its_reason(tmp_path: Path) -> None:
    model = write_scripted_model(tmp_path / "model", "abcdefgh\n", max_position_embeddings=40)
    session = open_session(model, is_raw=True, stop=("cd",), max_new_tokens=12)
    prompts = [session.encode(text) for text in ("12345\n", "x" * 30 + "efg", "x" * 36 + "e", "g")]
    told: list[tuple[int, str, str]] = []
    session.answer_all(prompts, lambda index, result: told.append((index, result.text, result.stop_reason)))
    assert told == [
        (2, "fgh", "context_full"),
        (0, "ab", "stop_string"),
        (1, "h\nab", "stop_string"),
        (3, "h\nab", "stop_string"),
    ]


def test_nothing_asked_loads_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsft.infer.session.load_model", lambda *_: pytest.fail("the model is loaded"))
    open_session(folder / "random").answer_all([], lambda *_: pytest.fail("an answer came"))


def test_an_interrupt_between_several_answers_leaves_the_session_usable(folder: Path) -> None:
    session = open_session(folder / "adapter")
    prompts = [session.encode(prompt) for prompt in PROMPTS]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answer_all(prompts, interrupt)
    assert ask(session, PROMPTS[0]) == ask(open_session(folder / "adapter"), PROMPTS[0])


def test_tokens_that_only_fill_the_vocabulary_up_are_no_text(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "random")
    model.resize_token_embeddings(320, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[300:].normal_(std=0.5)  # they are the likeliest now and then
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    session = open_session(tmp_path, is_raw=True, max_new_tokens=40)
    prompt = session.encode("go")
    result = session.answer(prompt, lambda _: None)
    output = model.generate(torch.tensor([prompt.token_ids]), max_new_tokens=40, do_sample=False, pad_token_id=0)
    tokens: list[int] = output[0, len(prompt.token_ids) :].tolist()
    assert max(tokens) >= 300 > min(tokens)
    assert result.num_new_tokens == len(tokens)
    assert result.text == make_tokenizer().decode([token for token in tokens if token < 259], skip_special_tokens=True)


def test_tells_the_model_it_decodes(folder: Path) -> None:
    assert isinstance(open_session(folder / "adapter").model, PeftModel)
    assert isinstance(open_session(folder / "random").model, LlamaForCausalLM)


OUT_OF_MEMORY = (
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "Triton Error [CUDA]: out of memory",
)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_too_little_gpu_memory_is_told_whoever_says_it_and_the_session_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    session = open_session(folder / "random")
    prompts = [session.encode(prompt) for prompt in PROMPTS[:2]]
    expected = ask(session, PROMPTS[0])

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", fail)
        with pytest.raises(DoesNotFitError, match=re.escape(message.partition("\n")[0])) as caught:
            session.answer_all(prompts, lambda *_: None)
        assert "\n" not in caught.value.found
        with pytest.raises(DoesNotFitError):
            ask(session, PROMPTS[0])
    assert ask(session, PROMPTS[0]) == expected


@pytest.mark.parametrize("message", ["[enforce fail] DefaultCPUAllocator: can't allocate memory", "mat1 and mat2"])
def test_other_errors_of_torch_are_not_taken_for_a_full_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    session = open_session(folder / "random")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ask(session, PROMPTS[0])
