"""Generation with drafts: the same tokens as without, whatever the drafts are, and figures that add up."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dsft.core.errors import ModelError
from dsft.infer.decoding import loop
from dsft.infer.decoding.draft import MAX_DRAFT_TOKENS
from dsft.infer.decoding.loop import Speculation, generate, generate_with_drafts
from dsft.infer.decoding.plain import PlainDecoder
from dsft.infer.sampling import Sampling
from tests.family_models import ALL, VOCAB_SIZE, make_family_model

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path is not available.*")

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=None)
PENALIZED = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.4, seed=None)
DRAWN = Sampling(temperature=0.8, top_p=0.95, top_k=20, repetition_penalty=1.1, seed=5)
PROMPT = [5, 17, 42, 9, 3, 60, 5, 17, 42, 9, 3, 60, 5, 17]

_models: dict[str, Any] = {}


def get_model(family: str = "llama") -> Any:
    """A family's model, made once."""
    if family not in _models:
        _models[family] = make_family_model(family)
    return _models[family]


def answer(model: Any, prompt: list[int], num_tokens: int, sampling: Sampling = GREEDY, stop: int = -1) -> list[int]:
    tokens: list[int] = []

    def receive(row: int, token_id: int) -> bool:
        tokens.append(token_id)
        return token_id == stop

    generate(PlainDecoder(model), [prompt], [num_tokens], sampling, receive)
    return tokens


def answer_with_drafts(
    decoder: PlainDecoder, prompt: list[int], num_tokens: int, sampling: Sampling = GREEDY, stop: int = -1
) -> tuple[list[int], Speculation]:
    tokens: list[int] = []

    def receive(token_id: int) -> bool:
        tokens.append(token_id)
        return token_id == stop

    return tokens, generate_with_drafts(decoder, prompt, num_tokens, sampling, receive)


class ScriptedDrafts:
    """Stands for `PromptLookup`: drafts of what is known to come, of random lengths, half of them with a mistake."""

    truth: Sequence[int] = ()
    mistakes: float = 0.5

    def __init__(self, text: Sequence[int]) -> None:
        self._num_tokens = len(text)
        self._generator = random.Random(len(self.truth))

    def append(self, token_id: int) -> None:
        assert token_id == self.truth[self._num_tokens]  # each token is told once and in order
        self._num_tokens += 1

    def find(self, max_tokens: int) -> list[int]:
        length = min(max_tokens, self._generator.randrange(MAX_DRAFT_TOKENS + 1))
        draft = list(self.truth[self._num_tokens : self._num_tokens + length])
        if draft and self._generator.random() < self.mistakes:
            place = self._generator.randrange(len(draft))
            draft[place] = (draft[place] + 1) % VOCAB_SIZE
        return draft


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedDrafts]:
    monkeypatch.setattr(loop, "PromptLookup", ScriptedDrafts)
    monkeypatch.setattr(ScriptedDrafts, "mistakes", 0.5)
    return ScriptedDrafts


@pytest.mark.parametrize("sampling", [GREEDY, PENALIZED, DRAWN], ids=["greedy", "penalized", "drawn"])
@pytest.mark.parametrize("family", ALL)
def test_drafts_right_or_wrong_change_nothing(
    family: str, sampling: Sampling, scripted: type[ScriptedDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model(family)
    expected = answer(model, PROMPT, 32, sampling)
    monkeypatch.setattr(scripted, "truth", PROMPT + expected)
    tokens, speculation = answer_with_drafts(PlainDecoder(model), PROMPT, 32, sampling)
    assert tokens == expected
    # The first token comes from the prompt's pass; each later pass gives one, and one more for each that it accepts.
    assert 1 + speculation.num_passes + speculation.num_accepted == len(expected)
    assert 0 < speculation.num_accepted < speculation.num_drafted
    assert len(set(expected)) > 5


@pytest.mark.parametrize("sampling", [GREEDY, PENALIZED, DRAWN], ids=["greedy", "penalized", "drawn"])
def test_prompt_lookup_changes_nothing_where_texts_repeat_themselves(sampling: Sampling) -> None:
    model = get_model()
    generator = random.Random(3)
    total = 0
    for _ in range(12):
        piece = [generator.randrange(VOCAB_SIZE) for _ in range(generator.randrange(1, 9))]
        prompt = (piece * 20)[: generator.randrange(2, 60)]
        expected = answer(model, prompt, 40, sampling)
        tokens, speculation = answer_with_drafts(PlainDecoder(model), prompt, 40, sampling)
        assert tokens == expected
        total += speculation.num_drafted
    assert total > 20


def test_a_model_that_repeats_its_prompt_takes_few_passes() -> None:
    model = make_family_model("llama")
    with torch.no_grad():  # each token is followed by the next number
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.normal_()
        model.get_output_embeddings().weight.copy_(embedding.roll(1, dims=0))
    prompt = [*range(10, 50), 10, 11]
    tokens, speculation = answer_with_drafts(PlainDecoder(model), prompt, 33)
    assert tokens == list(range(12, 45))
    assert speculation == Speculation(num_drafted=28, num_accepted=28, num_passes=4)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("mistakes", [0.0, 0.5])
def test_limits_and_stop_tokens_inside_a_draft_end_the_answer_there(
    sampling: Sampling, mistakes: float, scripted: type[ScriptedDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model()
    expected = answer(model, PROMPT, 24, sampling)
    monkeypatch.setattr(scripted, "truth", PROMPT + expected)
    monkeypatch.setattr(scripted, "mistakes", mistakes)
    for limit in range(1, 25):
        tokens, speculation = answer_with_drafts(PlainDecoder(model), PROMPT, limit, sampling)
        assert tokens == expected[:limit]
        assert 1 + speculation.num_passes + speculation.num_accepted == limit
    for stop in expected:
        tokens, speculation = answer_with_drafts(PlainDecoder(model), PROMPT, 24, sampling, stop)
        assert tokens == expected[: expected.index(stop) + 1]
        # Where the draft had the stop token, its pass gave no token of its own after it.
        num_missing = 1 + speculation.num_passes + speculation.num_accepted - len(tokens)
        assert num_missing in (0, 1)
        assert speculation.num_accepted <= speculation.num_drafted


def test_no_more_is_read_than_was_announced(scripted: type[ScriptedDrafts], monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model()
    expected = answer(model, PROMPT, 24)
    monkeypatch.setattr(scripted, "truth", PROMPT + expected)
    monkeypatch.setattr(scripted, "mistakes", 0.0)
    for limit in (1, 2, 5, 9, 24):
        decoder = PlainDecoder(model)
        longest = 0

        def extend(token_ids: Sequence[int], decoder: PlainDecoder = decoder) -> torch.Tensor:
            nonlocal longest
            logits = PlainDecoder.extend(decoder, token_ids)
            longest = max(longest, len(decoder._texts[0]) - len(PROMPT))
            return logits

        monkeypatch.setattr(decoder, "extend", extend)
        answer_with_drafts(decoder, PROMPT, limit)
        assert longest <= limit  # a decoder has room for as many


def test_what_a_draft_left_behind_does_not_reach_the_next_answer(
    scripted: type[ScriptedDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model()
    expected = answer(model, PROMPT, 24)
    monkeypatch.setattr(scripted, "truth", PROMPT + expected)
    decoder = PlainDecoder(model)
    for stop in expected[3:12]:  # the model has read drafts beyond the stop token
        first, _ = answer_with_drafts(decoder, PROMPT, 24, stop=stop)
        longer = [*PROMPT, *first, 7, 8]
        continued = answer(model, longer, 9)
        monkeypatch.setattr(scripted, "truth", longer + continued)
        assert answer_with_drafts(decoder, longer, 9)[0] == continued
        monkeypatch.setattr(scripted, "truth", PROMPT + expected)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_outputs_that_are_nan_are_an_error_where_they_are_chosen_from(
    sampling: Sampling, scripted: type[ScriptedDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model()
    expected = answer(model, PROMPT, 24, sampling)
    monkeypatch.setattr(scripted, "truth", PROMPT + expected)
    decoder = PlainDecoder(model)
    read = 0

    def extend(token_ids: Sequence[int]) -> torch.Tensor:
        nonlocal read
        logits = PlainDecoder.extend(decoder, token_ids)
        read = len(decoder._texts[0]) - len(PROMPT)
        first = read - len(token_ids) + 1  # tokens of the answer that were read before the first row of logits
        logits[[place for place in range(len(token_ids)) if first + place >= 10]] = float("nan")
        return logits

    monkeypatch.setattr(decoder, "extend", extend)
    tokens: list[int] = []
    with pytest.raises(ModelError, match="NaN"):
        generate_with_drafts(decoder, PROMPT, 24, sampling, lambda token_id: bool(tokens.append(token_id)))
    assert tokens == expected[:10]


@pytest.mark.parametrize("error", [BrokenPipeError, KeyboardInterrupt])
def test_an_error_of_the_receiver_leaves_nothing_behind(error: type[BaseException]) -> None:
    model = get_model()
    decoder = PlainDecoder(model)
    num_told = 0

    def receive(token_id: int) -> bool:
        nonlocal num_told
        num_told += 1
        if num_told == 5:
            raise error
        return False

    with pytest.raises(error):
        generate_with_drafts(decoder, PROMPT, 24, GREEDY, receive)
    longer = [*PROMPT, 7]
    assert answer_with_drafts(decoder, longer, 24)[0] == answer(model, longer, 24)
