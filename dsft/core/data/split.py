"""Holding out a share of the samples for validation, and looking at a part of a data set."""

import numpy as np
import numpy.typing as npt

from dsft.core.data.cache import TokenStore
from dsft.core.data.samples import Sample


class SubsetDataset:
    """Some samples of a store, in a given order.

    Args:
        store: All samples.
        indices: Which of them, int64, shape [num_samples].
    """

    def __init__(self, store: TokenStore, indices: npt.NDArray[np.int64]) -> None:
        self._store = store
        self._indices = indices
        self.lengths: npt.NDArray[np.int64] = store.lengths[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._store[int(self._indices[index])]


def split_by_prompt(
    prompts: npt.NDArray[np.uint64], fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold out a share of samples so that those with the same prompt stay together.

    Args:
        prompts: Prompt hash of each sample, uint64, shape [num_samples].
        fraction: Share to hold out, and one sample at least.
        seed: Decides which.

    Returns:
        Indices of the samples to train on and of those held out, both ascending; the second has as many as the share
        says, or as near as whole prompts come, which may be none.
    """
    unique, prompt_of_sample, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    wanted = max(1, round(fraction * len(prompts)))
    is_held_out = np.zeros(len(unique), dtype=np.bool_)
    if fraction > 0 and len(unique) > 1:
        order = np.random.default_rng(seed).permutation(len(unique))
        # Take prompts as they come while they fit; large ones that would overshoot are passed over.
        for index in order[:-1].tolist():
            if sizes[index] <= wanted:
                is_held_out[index] = True
                wanted -= int(sizes[index])
                if wanted == 0:
                    break
        # One more where that comes nearer to the share than staying below it.
        remaining = np.flatnonzero(~is_held_out)
        smallest = remaining[np.argmin(sizes[remaining])]
        if wanted and len(remaining) > 1 and sizes[smallest] - wanted < wanted:
            is_held_out[smallest] = True
    of_sample = is_held_out[prompt_of_sample]
    return np.flatnonzero(~of_sample), np.flatnonzero(of_sample)
