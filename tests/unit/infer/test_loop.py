"""Tokens one by one: the same as transformers gives, told in time, whatever the model's own generation settings say."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from dsft.core.errors import ModelError
from dsft.infer.decoding.loop import generate
from dsft.infer.decoding.make import read_end_token_ids
from dsft.infer.decoding.plain import PlainDecoder
from dsft.infer.sampling import Sampling
from tests.scripted_models import write_random_model

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=None)
PROMPT = [5, 17, 42, 99, 3]
UNUSED_TOKEN = 258


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture
def model(model_dir: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(model_dir).eval()


def answer(model: Any, sampling: Sampling = GREEDY, num_tokens: int = 24, stops: tuple[int, ...] = ()) -> list[int]:
    tokens: list[int] = []

    def receive(row: int, token_id: int) -> bool:
        tokens.append(token_id)
        return token_id in stops

    generate(PlainDecoder(model), [PROMPT], [num_tokens], sampling, receive)
    return tokens


def generate_with_transformers(model: Any, num_tokens: int = 24, **settings: Any) -> list[int]:
    model.generation_config = GenerationConfig()
    input_ids = torch.tensor([PROMPT])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        eos_token_id=UNUSED_TOKEN,
        pad_token_id=UNUSED_TOKEN,
        **settings,
    )
    ids: list[int] = output[0, len(PROMPT) :].tolist()
    return ids


def test_greedy_gives_transformers_tokens_and_those_of_a_loop_without_cache(model: Any) -> None:
    tokens = answer(model)
    assert tokens == generate_with_transformers(model, do_sample=False)
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(24):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert tokens == ids[len(PROMPT) :]
    assert len(set(tokens)) > 5  # the model does say something


def test_the_models_own_sampling_settings_do_not_count(model: Any) -> None:
    expected = answer(model)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=3
    )
    assert answer(model) == expected


def test_sampling_gives_transformers_tokens_for_the_seed(model: Any) -> None:
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=7)
    tokens = answer(model, sampling)
    torch.manual_seed(7)
    settings = {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}
    assert tokens == generate_with_transformers(model, do_sample=True, **settings)
    assert tokens == answer(model, sampling)
    other = Sampling(temperature=1.3, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=8)
    assert tokens != answer(model, other)


def test_sampling_without_top_k_draws_from_all_tokens(model: Any) -> None:
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1e-4)  # all 259 tokens are about equally likely
    everything = Sampling(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=0)
    assert len(set(answer(model, everything, num_tokens=200))) > 100  # transformers' own default takes 50
    few = Sampling(temperature=1.0, top_p=1.0, top_k=1, repetition_penalty=1.0, seed=0)
    assert answer(model, few) == answer(model)


def test_ends_with_the_first_stop_token(model: Any) -> None:
    tokens = answer(model)
    stop = tokens[9]
    position = tokens.index(stop)
    assert answer(model, stops=(UNUSED_TOKEN, stop)) == tokens[: position + 1]


def test_the_receiver_ends_it_at_once(model: Any) -> None:
    received: list[int] = []

    def receive(row: int, token_id: int) -> bool:
        received.append(token_id)
        return len(received) == 3

    generate(PlainDecoder(model), [PROMPT], [24], GREEDY, receive)
    assert len(received) == 3


def test_an_error_of_the_receiver_comes_through(model: Any) -> None:
    def receive(row: int, token_id: int) -> bool:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        generate(PlainDecoder(model), [PROMPT], [24], GREEDY, receive)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_that_are_nan_are_an_error(model: Any, temperature: float) -> None:
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        answer(model, Sampling(temperature, 1.0, 0, 1.0, seed=0))


@pytest.mark.parametrize(("recorded", "expected"), [(None, []), (7, [7]), ([7, 9], [7, 9])])
def test_reads_the_models_own_end_tokens(model: Any, recorded: Any, expected: list[int]) -> None:
    model.generation_config.eos_token_id = recorded
    assert read_end_token_ids(model) == expected


def test_nothing_is_printed_or_warned(model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = LlamaForCausalLM.from_pretrained(model_dir).eval()
    model.generation_config = GenerationConfig(temperature=0.5, top_p=0.5, do_sample=True)
    capfd.readouterr()
    answer(model)
    assert capfd.readouterr() == ("", "")


NUM_NAMES = 50
NAN_NAME = 13


class CountingDecoder:
    """The next token is a number made of the whole text, so a mixed-up row shows; NaN follows NAN_NAME."""

    device = torch.device("cpu")
    max_rows = 8

    def __init__(self) -> None:
        self.texts: list[list[int]] = []
        self.limit = 0
        self.num_passes = 0
        self.num_resets = 0

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        self.texts = [list(prompt) for prompt in prompts]
        self.limit = max_new_tokens
        self.num_passes = 0
        return self._logits()

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert token_ids.min() >= 0
        self.num_passes += 1
        assert self.num_passes <= self.limit  # a decoder has room for as many
        for text, token_id in zip(self.texts, token_ids.tolist(), strict=True):
            text.append(token_id)
        return self._logits()

    def know(self, token_ids: Sequence[int]) -> None:
        assert [text[-1] for text in self.texts] == [max(0, token_id) for token_id in token_ids]

    def extend(self, token_ids: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError

    def rewind(self, num_tokens: int) -> None:
        raise NotImplementedError

    def keep(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]

    def reset(self) -> None:
        self.texts = []
        self.num_resets += 1

    def without_adapter(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _logits(self) -> torch.Tensor:
        logits = torch.zeros(len(self.texts), NUM_NAMES)
        for row, text in enumerate(self.texts):
            logits[row, next_name(text)] = float("nan") if text[-1] == NAN_NAME else 1.0
        return logits


def next_name(text: Sequence[int]) -> int:
    return sum(place * name for place, name in enumerate(text, start=1)) % NUM_NAMES


def continue_names(prompt: Sequence[int], num_tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(next_name(text))
    return text[len(prompt) :]


def find_prompts(num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Prompts whose answers are free of NAN_NAME up to a length."""
    candidates = ([first, 3, 7][: 1 + first % 3] for first in range(1, NUM_NAMES) if first != NAN_NAME)
    return [prompt for prompt in candidates if NAN_NAME not in continue_names(prompt, num_tokens)][:num_prompts]


def run_rows(
    decoder: Any, prompts: list[list[int]], limits: list[int], stops: dict[int, int] | None = None
) -> list[list[int]]:
    """Answer; row r ends by itself at its token number stops[r]."""
    told: list[list[int]] = [[] for _ in prompts]

    def receive(row: int, token_id: int) -> bool:
        told[row].append(token_id)
        return len(told[row]) == (stops or {}).get(row)

    generate(decoder, prompts, limits, GREEDY, receive)
    return told


def test_rows_end_at_their_own_stops_and_limits() -> None:
    prompts = find_prompts(6, 12)
    limits, stops = [12, 1, 5, 12, 7, 3], {0: 4, 3: 9, 4: 7, 5: 1}
    lengths = [4, 1, 5, 9, 7, 1]
    expected = [continue_names(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    assert run_rows(CountingDecoder(), prompts, limits, stops) == expected


def test_no_pass_is_begun_whose_tokens_nobody_may_get() -> None:
    decoder = CountingDecoder()
    run_rows(decoder, find_prompts(3, 6), [2, 6, 1])
    assert decoder.num_passes == 5
    run_rows(decoder, find_prompts(3, 6), [1, 1, 1])
    assert decoder.num_passes == 0


def test_rows_of_a_model_end_without_a_word_to_the_others(model: Any) -> None:
    prompts = [PROMPT, [7, 8], [200, 100, 50, 25, 12, 6, 3], [1]]
    alone = []
    for prompt in prompts:
        tokens: list[int] = []
        generate(
            PlainDecoder(model), [prompt], [16], GREEDY, lambda _, token, tokens=tokens: bool(tokens.append(token))
        )
        alone.append(tokens)
    told = run_rows(PlainDecoder(model), prompts, [16, 2, 16, 9], {0: 5})
    assert told == [alone[0][:5], alone[1][:2], alone[2], alone[3][:9]]


def test_nan_ends_it_where_a_row_has_no_token_and_not_before() -> None:
    good, *_ = find_prompts(1, 12)
    bad = next([first] for first in range(1, NUM_NAMES) if NAN_NAME in continue_names([first], 4)[1:])
    length = continue_names(bad, 12).index(NAN_NAME) + 1  # the token after NAN_NAME is none
    decoder = CountingDecoder()
    told: list[list[int]] = [[], []]
    with pytest.raises(ModelError, match="NaN"):
        generate(decoder, [good, bad], [12, 12], GREEDY, lambda row, token: bool(told[row].append(token)))
    assert told == [continue_names(good, length + 1), continue_names(bad, length)]
    assert decoder.num_resets == 1

    # What is read in vain after a row's last token is not told, even if it is no number.
    assert run_rows(decoder, [good, bad], [12, length]) == [continue_names(good, 12), continue_names(bad, length)]
    assert run_rows(decoder, [good, bad], [12, 12], {1: length})[0] == continue_names(good, 12)


def test_a_penalty_counts_each_rows_own_tokens(model: Any) -> None:
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.5, seed=None)
    prompts = [PROMPT, [7, 8], [200, 100, 50, 25, 12, 6, 3]]
    limits = [16, 3, 16]
    told: list[list[int]] = [[] for _ in prompts]
    generate(PlainDecoder(model), prompts, limits, sampling, lambda row, token: bool(told[row].append(token)))
    for prompt, limit, tokens in zip(prompts, limits, told, strict=True):
        alone: list[int] = []
        generate(
            PlainDecoder(model), [prompt], [limit], sampling, lambda _, token, alone=alone: bool(alone.append(token))
        )
        assert tokens == alone


@pytest.mark.parametrize("error", [BrokenPipeError, KeyboardInterrupt])
def test_after_an_error_of_the_receiver_the_next_answer_is_right(model: Any, error: type[BaseException]) -> None:
    decoder = PlainDecoder(model)
    expected = answer(model)
    num_told = 0

    def receive(row: int, token_id: int) -> bool:
        nonlocal num_told
        num_told += 1
        if num_told == 4:
            raise error
        return False

    for prompts in ([PROMPT], [PROMPT, [7, 8]]):
        num_told = 0
        with pytest.raises(error):
            generate(decoder, prompts, [24] * len(prompts), GREEDY, receive)
        assert run_rows(decoder, [PROMPT], [24]) == [expected]


def test_an_interrupt_in_the_middle_of_a_pass_leaves_nothing_behind(model: Any) -> None:
    decoder = PlainDecoder(model)
    expected = answer(model)
    num_calls = 0

    def interrupt(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt

    # The first block has kept the token's keys by then, and the second has not.
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_rows(decoder, [PROMPT], [24])
    handle.remove()
    assert run_rows(decoder, [PROMPT], [24]) == [expected]
