"""The choice of a token: rows that leave no choice are told as such, and change nothing for the others."""

from typing import Any

import pytest
import torch

from dsft.core.errors import ModelError
from dsft.infer.decoding.choose import NAN_TOKEN, TokenChooser, check_token
from dsft.infer.sampling import Sampling

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
FULL = torch.linspace(-2.0, 2.0, 8)


def make_sampling(**changes: Any) -> Sampling:
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 3}
    return Sampling(**(settings | changes))


def row(**values: float) -> torch.Tensor:
    """Return logits, with others at some places: `_2=INF`."""
    logits = FULL.clone()
    for place, value in values.items():
        logits[int(place[1:])] = value
    return logits


BAD_ROWS = [row(_2=NAN), row(_0=INF), row(_2=INF, _7=-INF), torch.full((8,), -INF), torch.full((8,), NAN)]
NARROWED = [{}, {"top_k": 3}, {"top_k": 1}, {"top_p": 0.5}, {"temperature": 0.5, "repetition_penalty": 1.3}]


@pytest.mark.parametrize("settings", NARROWED)
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_row_without_probabilities_has_no_token_and_the_others_draw_on(
    settings: dict[str, Any], bad: torch.Tensor
) -> None:
    def draw(first: torch.Tensor) -> list[list[int]]:
        chooser = TokenChooser(make_sampling(**settings), [[1], [2], [3]], CPU)
        return [chooser.choose(torch.stack([first, FULL, row(_3=-INF)])).tolist() for _ in range(20)]

    found = draw(bad)
    assert {tokens[0] for tokens in found} == {NAN_TOKEN}
    expected = draw(torch.zeros(8))
    assert [tokens[1:] for tokens in found] == [tokens[1:] for tokens in expected]
    assert all(0 <= token < 8 for tokens in expected for token in tokens)


@pytest.mark.parametrize("settings", [{"temperature": 1e-40}, {"repetition_penalty": 1e-300}])
def test_settings_that_overflow_do_not_break_the_draw(settings: dict[str, Any]) -> None:
    chooser = TokenChooser(make_sampling(**settings), [[7]], CPU)
    assert chooser.choose(FULL[None] * 10).tolist() == [NAN_TOKEN]


def test_the_likeliest_token_may_be_infinitely_likely_but_not_nan() -> None:
    chooser = TokenChooser(make_sampling(temperature=0.0, seed=None), [[1], [1], [1]], CPU)
    assert chooser.choose(torch.stack([row(_2=INF), row(_2=NAN), row(_7=-INF)])).tolist() == [2, NAN_TOKEN, 6]


def test_no_token_is_an_error_when_it_is_read() -> None:
    assert check_token(0) == 0
    with pytest.raises(ModelError, match="NaN or infinite"):
        check_token(NAN_TOKEN)
