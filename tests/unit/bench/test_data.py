"""Random samples: full length, all targets but the first, the same each time."""

import numpy as np

from dsft.bench.data import RandomSamples


def test_random_samples_are_full_and_repeatable() -> None:
    samples = RandomSamples(num_samples=4, length=16, vocab_size=10, seed=3)
    assert len(samples) == 4
    assert samples.lengths.tolist() == [16] * 4
    first = samples[0]
    assert first.token_ids.shape == (16,)
    assert 0 <= first.token_ids.min() <= first.token_ids.max() < 10
    assert first.is_target.tolist() == [False] + [True] * 15
    np.testing.assert_array_equal(first.token_ids, RandomSamples(9, 16, 10, 3)[0].token_ids)
    assert not np.array_equal(first.token_ids, samples[1].token_ids)
