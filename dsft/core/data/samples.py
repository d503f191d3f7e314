"""The two shapes data has between the tokenizer and the model: one sample, and a set of them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sample:
    """One tokenized training sample.

    Attributes:
        token_ids: Token ids, int64, shape [length].
        is_target: True where the token carries loss (the token itself, before any shift), bool, shape [length].
        row: Position of the source row in its data set, counted from 0 over all rows read, bad ones included.
    """

    token_ids: npt.NDArray[np.int64]
    is_target: npt.NDArray[np.bool_]
    row: int


class TokenizedDataset(Protocol):
    """A random-access set of tokenized samples; the implementation reads them from a memory-mapped cache."""

    lengths: npt.NDArray[np.int64]
    """Tokens of each sample, shape [num_samples]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
