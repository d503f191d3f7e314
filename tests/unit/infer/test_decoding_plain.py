"""Decoding by transformers' modules: what rows, going back, prefixes and adapters give is what reading afresh gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dsft.infer.decoding.plain import PlainDecoder
from tests.family_models import ALL, WITH_ROWS, answer_afresh, make_family_model, read_afresh

PROMPTS = ([5, 17, 42, 9, 3, 60, 11, 23, 8, 31, 77, 50], [9, 3, 60, 11], [42], [31, 77, 50, 5, 17, 42, 9])
LONG = PROMPTS[0]

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path is not available.*")

_models: dict[str, nn.Module] = {}


def get_model(family: str) -> Any:
    """A family's model, made once."""
    if family not in _models:
        _models[family] = make_family_model(family)
    return _models[family]


@pytest.fixture(params=ALL)
def model(request: pytest.FixtureRequest) -> Any:
    return get_model(request.param)


@pytest.fixture(params=WITH_ROWS)
def row_model(request: pytest.FixtureRequest) -> Any:
    return get_model(request.param)


@contextmanager
def counting_tokens(model: nn.Module) -> Iterator[list[int]]:
    """Collects how many tokens each pass reads."""
    counts: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, given: counts.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield counts
    finally:
        handle.remove()


def assert_after(logits: torch.Tensor, model: nn.Module, *texts: list[int]) -> None:
    """The rows of logits are those after the texts."""
    expected = torch.stack([read_afresh(model, text)[-1] for text in texts])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def take(model: Any, decoder: PlainDecoder, logits: torch.Tensor, num_tokens: int) -> list[list[int]]:
    """The likeliest tokens, row by row."""
    chosen = [logits.argmax(dim=-1)]
    for _ in range(num_tokens - 1):
        chosen.append(decoder.step(chosen[-1]).argmax(dim=-1))
    return torch.stack(chosen, dim=1).tolist()


def test_one_row_gives_the_tokens_of_reading_afresh(model: Any) -> None:
    decoder = PlainDecoder(model)
    expected = answer_afresh(model, LONG, 20)
    assert take(model, decoder, decoder.start([LONG], 20), 20) == [expected]
    assert len(set(expected)) > 3  # the model does say something


def test_rows_of_different_lengths_give_the_tokens_of_each_alone(row_model: Any) -> None:
    decoder = PlainDecoder(row_model)
    logits = decoder.start(PROMPTS, 16)
    assert_after(logits, row_model, *PROMPTS)
    assert take(row_model, decoder, logits, 16) == [answer_afresh(row_model, prompt, 16) for prompt in PROMPTS]


def test_rows_of_one_length_do_too(row_model: Any) -> None:
    prompts = [LONG[:5], LONG[1:6], LONG[4:9]]
    decoder = PlainDecoder(row_model)
    logits = decoder.start(prompts, 9)
    assert take(row_model, decoder, logits, 9) == [answer_afresh(row_model, prompt, 9) for prompt in prompts]


def test_kept_rows_go_on_in_the_order_asked_for(row_model: Any) -> None:
    decoder = PlainDecoder(row_model)
    decoder.start(PROMPTS, 9)
    decoder.step(torch.tensor([1, 2, 3, 4]))
    decoder.keep([3, 1])
    assert_after(decoder.step(torch.tensor([8, 9])), row_model, [*PROMPTS[3], 4, 8], [*PROMPTS[1], 2, 9])
    decoder.keep([1])
    assert_after(decoder.step(torch.tensor([7])), row_model, [*PROMPTS[1], 2, 9, 7])


def test_a_padded_row_that_is_left_alone_is_a_row_like_any_other(row_model: Any) -> None:
    decoder = PlainDecoder(row_model)
    decoder.start([PROMPTS[1], LONG], 9)
    decoder.step(torch.tensor([1, 2]))
    decoder.keep([0])
    text = [*PROMPTS[1], 1]
    assert_after(decoder.extend([6, 7, 8])[-1:], row_model, [*text, 6, 7, 8])
    decoder.rewind(2)
    assert_after(decoder.step(torch.tensor([5])), row_model, [*text, 6, 5])
    other = [*text, 6, 40, 41]
    assert_after(decoder.start([other], 9), row_model, other)  # with what both have in common, and its padding
    assert_after(decoder.step(torch.tensor([5])), row_model, [*other, 5])


def test_several_tokens_at_once_give_the_logits_after_each(model: Any) -> None:
    decoder = PlainDecoder(model)
    decoder.start([LONG], 9)
    logits = decoder.extend([6, 7, 8])
    assert_after(logits, model, [*LONG, 6], [*LONG, 6, 7], [*LONG, 6, 7, 8])


def test_what_is_rewound_is_forgotten(model: Any) -> None:
    decoder = PlainDecoder(model)
    decoder.start([LONG], 20)
    decoder.extend([6, 7, 8, 9])
    decoder.rewind(3)
    assert_after(decoder.extend([1, 2]), model, [*LONG, 6, 1], [*LONG, 6, 1, 2])
    decoder.rewind(0)
    assert_after(decoder.step(torch.tensor([4])), model, [*LONG, 6, 1, 2, 4])
    decoder.rewind(4 + len(LONG) - 2)  # far into the prompt
    assert_after(decoder.step(torch.tensor([4])), model, [*LONG[:2], 4])


def test_after_a_reset_nothing_is_left(model: Any) -> None:
    decoder = PlainDecoder(model)
    decoder.start([LONG], 9)
    decoder.reset()
    with counting_tokens(model) as counts:
        assert_after(decoder.start([LONG], 9), model, LONG)
    assert sum(counts[:-1]) == len(LONG)  # the last pass is the expectation's


@pytest.mark.parametrize(
    ("second", "num_read"),
    [
        ([*LONG, 6, 7, 1, 2, 3], 3),  # the conversation goes on
        (LONG, 1),  # asked again: the last token's logits are wanted
        (LONG[:7], 1),  # the beginning of it
        ([*LONG[:4], 1, 2], 2),  # parts from it in the middle
        ([1, *LONG[1:]], len(LONG)),  # has nothing in common
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_prompt_is_read_from_where_it_parts_from_the_row(family: str, second: list[int], num_read: int) -> None:
    model = get_model(family)
    decoder = PlainDecoder(model)
    decoder.start([LONG], 9)
    decoder.extend([6, 7])
    with counting_tokens(model) as counts:
        logits = decoder.start([second], 9)
    assert counts == [num_read]
    assert_after(logits, model, second)
    assert_after(decoder.step(torch.tensor([4])), model, [*second, 4])


@pytest.mark.parametrize("family", ["mistral", "gemma2", "jamba", "mamba"])
def test_what_cannot_go_back_is_read_again(family: str) -> None:
    model = get_model(family)
    decoder = PlainDecoder(model)
    decoder.start([LONG], 9)
    decoder.extend([6, 7])
    for second in ([*LONG, 6, 7, 1, 2], [*LONG[:4], 1, 2], LONG[:3]):
        assert_after(decoder.start([second], 9), model, second)


def test_several_rows_leave_nothing_for_one(row_model: Any) -> None:
    decoder = PlainDecoder(row_model)
    decoder.start([LONG, LONG], 9)
    assert_after(decoder.start([[*LONG, 4]], 9), row_model, [*LONG, 4])
    decoder.start([LONG, PROMPTS[1]], 9)
    assert_after(decoder.start(PROMPTS[:3], 9), row_model, *PROMPTS[:3])


@pytest.mark.parametrize(("family", "max_rows"), [("llama", 32), ("mistral", 32), ("jamba", 32), ("mamba", 1)])
def test_tells_its_rows_before_it_has_read_anything(family: str, max_rows: int) -> None:
    decoder = PlainDecoder(get_model(family))
    assert decoder.max_rows == max_rows
    assert_after(decoder.start([LONG], 9), get_model(family), LONG)
    assert decoder.max_rows == max_rows
    assert_after(decoder.step(torch.tensor([4])), get_model(family), [*LONG, 4])


def test_a_family_without_keys_and_values_rewinds_for_nothing() -> None:
    model = get_model("mamba")
    decoder = PlainDecoder(model)
    decoder.start([LONG], 9)
    decoder.extend([6, 7])
    with counting_tokens(model) as counts:
        decoder.rewind(2)
    assert counts == []


@pytest.fixture
def adapted() -> Any:
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(make_family_model("llama"), lora).eval()


def test_without_adapter_the_base_alone_computes(adapted: Any) -> None:
    base = get_model("llama")  # of the same seed
    decoder = PlainDecoder(adapted)
    expected = read_afresh(adapted, LONG)[-1:]
    assert (read_afresh(base, LONG)[-1:] - expected).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(decoder.start([LONG], 9), expected, rtol=1e-3, atol=1e-3)
    with decoder.without_adapter():
        assert_after(decoder.start([LONG], 9), base, LONG)  # and nothing of the adapter's reading is left
        assert_after(decoder.step(torch.tensor([4])), base, [*LONG, 4])
    assert_after(decoder.start([LONG], 9), adapted, LONG)


@pytest.mark.parametrize("error", [BrokenPipeError, KeyboardInterrupt])
def test_after_an_error_without_the_adapter_it_is_back(adapted: Any, error: type[BaseException]) -> None:
    decoder = PlainDecoder(adapted)

    def fail() -> None:
        with decoder.without_adapter():
            decoder.start([LONG], 9)
            raise error

    with pytest.raises(error):
        fail()
    longer = [*LONG, 4]
    assert_after(decoder.start([longer], 9), adapted, longer)


def test_a_model_without_an_adapter_has_none_to_leave_out() -> None:
    model = get_model("llama")
    decoder = PlainDecoder(model)
    with decoder.without_adapter():
        assert_after(decoder.start([LONG], 9), model, LONG)
