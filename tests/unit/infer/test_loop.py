"""Tokens one by one: the same as transformers gives, told in time, whatever the model's own generation settings say."""

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
