"""Packed sequences: every sample once, none too long, always the same, and nearly full."""

import numpy as np
import numpy.typing as npt
import pytest

from dsft.core.data import packing
from dsft.core.data.packing import pack_sequences

MAX_LENGTH = 1024


def random_lengths(kind: str, num_samples: int = 3000) -> npt.NDArray[np.int64]:
    generator = np.random.default_rng(len(kind))
    lengths = {
        "short": generator.integers(1, 60, num_samples),
        "uniform": generator.integers(1, MAX_LENGTH + 1, num_samples),
        "instruction data": generator.lognormal(5, 0.8, num_samples).astype(np.int64) + 8,
        "long": generator.integers(MAX_LENGTH // 2 + 1, MAX_LENGTH + 1, num_samples),
        "thirds": np.full(num_samples, MAX_LENGTH // 3),
    }[kind]
    return np.clip(lengths, 1, MAX_LENGTH)


def fewest_packs(lengths: npt.NDArray[np.int64]) -> int:
    """Return a number of sequences below which no packing comes: by volume, and samples above half never share."""
    return max(-(-int(lengths.sum()) // MAX_LENGTH), int((lengths > MAX_LENGTH // 2).sum()))


@pytest.mark.parametrize("kind", ["short", "uniform", "instruction data", "long", "thirds"])
@pytest.mark.parametrize("window", [100, 1 << 14])
def test_every_sample_is_in_one_sequence_and_none_is_too_long(kind: str, window: int, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_SAMPLES", window)
    lengths = random_lengths(kind)
    packs = pack_sequences(lengths, MAX_LENGTH, seed=0)
    assert sorted(index for pack in packs for index in pack.tolist()) == list(range(len(lengths)))
    assert max(int(lengths[pack].sum()) for pack in packs) <= MAX_LENGTH
    assert all((np.diff(pack) > 0).all() for pack in packs)


@pytest.mark.parametrize("kind", ["short", "uniform", "instruction data", "long", "thirds"])
def test_hardly_a_sequence_more_than_the_fewest_possible(kind: str):
    lengths = random_lengths(kind)
    assert len(pack_sequences(lengths, MAX_LENGTH, seed=0)) <= 1.01 * fewest_packs(lengths) + 1


def test_a_sample_goes_where_the_least_room_is_left_over():
    lengths = np.array([7, 6, 3, 2, 2])  # the 3 beside the 6 would leave no place for both of the 2
    packs = pack_sequences(lengths, 10, seed=0)
    assert sorted(lengths[pack].tolist() for pack in packs) == [[6, 2, 2], [7, 3]]


def test_the_same_seed_packs_the_same_and_another_seed_otherwise(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_SAMPLES", 500)
    lengths = random_lengths("instruction data")
    first, again, other = ([pack.tolist() for pack in pack_sequences(lengths, MAX_LENGTH, seed)] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_window_is_drawn_from_everywhere(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_SAMPLES", 500)
    packs = pack_sequences(np.full(5000, 100), MAX_LENGTH, seed=0)
    first_window = np.concatenate(packs[:50])
    assert 2000 < first_window.mean() < 3000


def test_nothing_is_packed_into_nothing():
    assert pack_sequences(np.empty(0, dtype=np.int64), MAX_LENGTH, seed=0) == []


def test_samples_of_the_very_length_stay_alone():
    packs = pack_sequences(np.array([MAX_LENGTH, MAX_LENGTH, 1]), MAX_LENGTH, seed=0)
    assert sorted(pack.tolist() for pack in packs) == [[0], [1], [2]]


def test_a_sample_longer_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="1025 tokens does not fit into a sequence of 1024"):
        pack_sequences(np.array([3, 1025]), MAX_LENGTH, seed=0)
