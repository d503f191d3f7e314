"""The sequences a row trains on: full-length random ones, or samples of a data set prepared as `dsft train` does."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dsft.bench.rows import BenchRow
from dsft.core.config.schema import TrainConfig
from dsft.core.data.packing import pack_sequences
from dsft.core.data.prepare import prepare_data
from dsft.core.data.samples import Sample
from dsft.core.data.sources import open_source
from dsft.core.models.source import ModelSource
from dsft.core.models.tokenizer import load_tokenizer
from dsft.core.paths import cache_dir
from dsft.train.batches import SequenceDataset


@dataclass(frozen=True)
class RowData:
    """What a row trains on.

    Attributes:
        sequences: The sequences.
        description: One phrase for people.
        longest_validation: Tokens of the longest sample held out; 0 where none is.
        is_random: Whether the tokens are random.
    """

    sequences: SequenceDataset
    description: str
    longest_validation: int
    is_random: bool


class RandomSamples:
    """Samples of random tokens, all of one length, every token but the first a target; see `TokenizedDataset`.

    Args:
        num_samples: How many.
        length: Tokens of each.
        vocab_size: Ids are below this.
        seed: Each sample depends on this and its index alone.
    """

    def __init__(self, num_samples: int, length: int, vocab_size: int, seed: int) -> None:
        self.lengths = np.full(num_samples, length, dtype=np.int64)
        self._vocab_size = vocab_size
        self._seed = seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        length = int(self.lengths[index])
        token_ids = np.random.default_rng([self._seed, index]).integers(0, self._vocab_size, length, dtype=np.int64)
        is_target = np.ones(length, dtype=np.bool_)
        is_target[0] = False
        return Sample(token_ids, is_target, row=index)


def prepare_row_data(
    row: BenchRow, source: ModelSource, num_steps: int, *, use_random: bool, on_rows: Callable[[int], None]
) -> RowData:
    """Make or read what a row trains on.

    Args:
        row: The row.
        source: Its model.
        num_steps: Optimizer steps that will run; random samples are made for so many.
        use_random: Take random samples whatever data the row names.
        on_rows: Called now and then with the number of rows tokenized.

    Raises:
        DsftError: The data set or the tokenizer can't be used.
    """
    config = row.config
    if use_random or not row.names_data:
        return _make_random(config, int(source.model_config["vocab_size"]), num_steps)
    tokenizer = load_tokenizer(source)
    data = prepare_data(
        config,
        open_source(config.dataset, split=config.dataset_split, revision=config.dataset_revision),
        tokenizer.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        cache=cache_dir(),
        on_rows=on_rows,
    )
    packs = pack_sequences(data.train.lengths, config.max_length, config.seed) if config.packing else None
    longest_validation = int(data.validation.lengths.max()) if data.validation is not None else 0
    described = f"{config.dataset}: {len(data.train):,} samples" + (", packed" if config.packing else "")
    return RowData(SequenceDataset(data.train, packs), described, longest_validation, is_random=False)


def _make_random(config: TrainConfig, vocab_size: int, num_steps: int) -> RowData:
    num_samples = config.effective_batch_size * num_steps
    samples = RandomSamples(num_samples, config.max_length, vocab_size, config.seed)
    return RowData(
        SequenceDataset(samples),
        "random tokens, every sequence as long as max_length, all of them targets",
        config.max_length,
        is_random=True,
    )
