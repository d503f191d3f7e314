"""What the model gets: a sample as the protocol describes it, whatever lies behind it."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from dsft.core.data.cache import open_or_build
from dsft.core.data.prompts import get_template
from dsft.core.data.samples import Sample, TokenizedDataset
from dsft.core.data.split import SubsetDataset
from dsft.core.data.tokenize import LengthRule, PlacedExample, SampleMaker
from tests.unit.core.data.conversations import converse


@pytest.fixture
def datasets(small, tmp_path: Path) -> list[TokenizedDataset]:
    """A store of three samples, of which the second row was unusable, and a part of it."""
    maker = SampleMaker(get_template("instruction", small), LengthRule(500, "drop", "response", 0))
    placed = [PlacedExample(row, f"f:{row}", converse("a" * (row + 1), f"b{row}")) for row in (0, 2, 3)]

    def build(writer) -> dict[str, object]:
        writer.add(maker.make(placed))
        return {}

    store, _ = open_or_build(tmp_path, "key", 400, build)
    return [store, SubsetDataset(store, np.array([2, 0]))]


def test_every_data_set_keeps_the_protocol(datasets):
    for dataset, rows in zip(datasets, ([0, 2, 3], [3, 0]), strict=True):
        samples = [dataset[index] for index in range(len(dataset))]
        assert [sample.row for sample in samples] == rows, "counted over all rows read"
        assert [len(sample.token_ids) for sample in samples] == dataset.lengths.tolist()
        assert all(sample.is_target.any() for sample in samples)
        for sample in samples:
            assert (sample.token_ids.dtype, sample.is_target.dtype) == (np.int64, np.bool_)
            assert len(sample.token_ids) == len(sample.is_target)


def test_the_mask_is_of_the_token_itself_not_of_the_one_before_it(small, datasets):
    sample = datasets[0][1]
    assert small.decode(sample.token_ids[sample.is_target]) == f"b2{small.eos_token}"


def test_a_sample_s_fields_can_t_be_exchanged():
    sample = Sample(np.array([1]), np.array([True]), 0)
    with pytest.raises(FrozenInstanceError):
        sample.row = 1
