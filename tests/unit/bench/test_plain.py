"""The padded batches of the plain path."""

import numpy as np

from dsft.bench.plain import pad_sequences
from dsft.core.data.samples import Sample


def make_sample(ids: list[int], targets: list[bool]) -> Sample:
    return Sample(np.array(ids), np.array(targets), 0)


def test_sequences_are_padded_on_the_right_to_the_longest() -> None:
    batch = pad_sequences(
        [[make_sample([5, 6, 7], [True, False, True])], [make_sample([8], [True]), make_sample([9, 4], [True, True])],
         [make_sample([3, 2], [False, True])]]
    )  # fmt: skip
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 4], [3, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    # A sample's first token is no target: nothing of its own stands before it.
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, -100, 4], [-100, 2, -100]]
