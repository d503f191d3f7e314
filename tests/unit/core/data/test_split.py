"""Held-out samples: the right share, whole prompts, always the same ones."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dsft.core.data.cache import StoreWriter, open_or_build
from dsft.core.data.split import SubsetDataset, split_by_prompt
from tests.unit.core.data.test_cache import EXPECTED, build


def make_prompts(sizes: list[int], seed: int = 0) -> npt.NDArray[np.uint64]:
    """Return prompt hashes in random order, of which the n-th occurs as often as the n-th size says."""
    hashes = np.random.default_rng(seed).integers(0, 2**64, len(sizes), dtype=np.uint64)
    prompts: npt.NDArray[np.uint64] = np.random.default_rng(seed).permutation(np.repeat(hashes, sizes))
    return prompts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.01, 0.02, 0.1, 0.5, 0.9])
def test_a_share_is_held_out_and_no_prompt_is_in_both(fraction: float, seed: int):
    sizes = np.random.default_rng(seed).geometric(0.5, 500).tolist()
    prompts = make_prompts(sizes, seed)
    train, held_out = split_by_prompt(prompts, fraction, seed)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(len(prompts)))
    assert (np.diff(train) > 0).all() and (np.diff(held_out) > 0).all()
    assert not set(prompts[train].tolist()) & set(prompts[held_out].tolist())
    assert len(held_out) == round(fraction * len(prompts))


def test_the_same_seed_holds_out_the_same_and_another_seed_others():
    prompts = make_prompts([1] * 1000)
    first, again, other = (split_by_prompt(prompts, 0.1, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again
    assert len(set(first) & set(other)) < 50


def test_prompts_decide_not_where_they_stand():
    prompts = make_prompts([1] * 200)
    held_out = set(prompts[split_by_prompt(prompts, 0.2, 3)[1]].tolist())
    order = np.random.default_rng(9).permutation(len(prompts))
    moved = prompts[order]
    assert set(moved[split_by_prompt(moved, 0.2, 3)[1]].tolist()) == held_out


def test_held_out_samples_come_from_everywhere():
    _, held_out = split_by_prompt(make_prompts([1] * 10_000), 0.1, 0)
    assert 4500 < held_out.mean() < 5500


@pytest.mark.parametrize(("num_samples", "expected"), [(2, 1), (10, 1), (49, 1), (100, 2)])
def test_one_sample_at_least_is_held_out(num_samples: int, expected: int):
    train, held_out = split_by_prompt(make_prompts([1] * num_samples), 0.02, 0)
    assert (len(train), len(held_out)) == (num_samples - expected, expected)


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        ([1] * 10, 0.0, 0),
        ([7], 0.5, 0),  # one prompt can't be on both sides
        ([], 0.5, 0),
        ([1], 0.5, 0),
        ([50, 50], 0.02, 0),  # half of all is not nearer to two of a hundred than none
        ([50, 3, 50], 0.02, 3),
        ([5, 5], 0.6, 5),
        ([1, 99], 0.5, 1),
        ([1, 1], 0.99, 1),  # something is left to train on
    ],
)
def test_as_near_as_whole_prompts_come(sizes: list[int], fraction: float, expected: int):
    for seed in range(10):
        train, held_out = split_by_prompt(make_prompts(sizes), fraction, seed)
        assert len(held_out) == expected
        assert len(train) == sum(sizes) - expected


def test_a_subset_is_some_samples_of_a_store(tmp_path: Path):
    store, _ = open_or_build(tmp_path, "key", 100, build)
    subset = SubsetDataset(store, np.array([2, 0]))
    assert len(subset) == 2
    assert subset.lengths.tolist() == [4, 3]
    for index, of_store in enumerate([2, 0]):
        assert (subset[index].token_ids.tolist(), subset[index].row) == (EXPECTED[of_store][0], EXPECTED[of_store][2])
    with pytest.raises(IndexError):
        subset[2]


def test_a_subset_may_be_empty(tmp_path: Path):
    def build_nothing(writer: StoreWriter) -> dict[str, object]:
        return {}

    store, _ = open_or_build(tmp_path, "key", 100, build_nothing)
    subset = SubsetDataset(store, np.empty(0, dtype=np.int64))
    assert (len(subset), subset.lengths.tolist()) == (0, [])
