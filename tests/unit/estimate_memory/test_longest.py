"""The longest length that fits: the next one does not, and the model's own limits are kept."""

from pathlib import Path

import pytest

from dsft.core.errors import DoesNotFitError, ModelError
from dsft.core.memory.cards import card_of_memory
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.longest import STEP_TOKENS, find_longest
from dsft.estimate_memory.model import find_shape
from dsft.estimate_memory.plans import plan_training
from tests.unit.estimate_memory.estimates import BUDGET, configure, write_model

SMALL_CARD = Budget(card_of_memory(7), "vram")


@pytest.mark.parametrize(
    "flags", [{}, {"plan": "off"}, {"micro_batch": 2}, {"recompute_blocks": 20}, {"optimizer": "adamw"}]
)
def test_the_next_length_does_not_fit(flags: dict[str, object]) -> None:
    config = configure(lora_r=16, **flags)
    model = find_shape(config)
    length, _ = find_longest(config, model, SMALL_CARD)
    assert length % STEP_TOKENS == 0

    def fits(candidate: int) -> bool:
        changed = config.model_copy(update={"max_length": candidate})
        return plan_training(changed, model, SMALL_CARD).chosen.fits

    assert fits(length)
    assert not fits(length + STEP_TOKENS)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 4096),
        ({"max_position_embeddings": 1000}, 960),
        ({"model_type": "mistral", "sliding_window": 600}, 576),
        ({"max_position_embeddings": 64}, 64),
    ],
)
def test_no_length_is_beyond_what_the_model_takes(tmp_path: Path, changes: dict[str, object], longest: int) -> None:
    config = configure(model_name=write_model(tmp_path / "model", **changes))
    assert find_longest(config, find_shape(config), BUDGET) == (longest, longest)


def test_a_card_too_small_for_any_length_is_told() -> None:
    config = configure()
    with pytest.raises(DoesNotFitError, match="even with 64 tokens the run needs"):
        find_longest(config, find_shape(config), Budget(card_of_memory(3), "vram"))


@pytest.mark.parametrize("positions", [None, "many", 32])
def test_a_model_without_positions_has_no_longest_length(tmp_path: Path, positions: object) -> None:
    config = configure(model_name=write_model(tmp_path / "model", max_position_embeddings=positions))
    with pytest.raises(ModelError, match="max_position_embeddings is"):
        find_longest(config, find_shape(config), BUDGET)
