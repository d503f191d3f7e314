"""Samples of random tokens, in memory."""

import numpy as np

from dsft.core.data.samples import Sample

VOCABULARY = 128


class ListDataset:
    """Samples in memory, in the shape of a `TokenizedDataset`."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples
        self.lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def make_sample(rng: np.random.Generator, length: int, row: int = 0) -> Sample:
    prompt = int(rng.integers(1, length - 1))
    return Sample(
        token_ids=rng.integers(0, VOCABULARY, length).astype(np.int64),
        is_target=np.arange(length) >= prompt,
        row=row,
    )


def make_samples(count: int, seed: int = 0) -> ListDataset:
    rng = np.random.default_rng(seed)
    return ListDataset([make_sample(rng, int(rng.integers(5, 40)), row) for row in range(count)])
