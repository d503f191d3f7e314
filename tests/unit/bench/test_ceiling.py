"""The products that are timed alone, and the rate that comes out."""

import pytest
import torch

from dsft.bench import ceiling
from dsft.bench.ceiling import list_products, measure_ceiling
from dsft.core.memory.loss_chunks import chunk_rows
from tests.unit.bench.test_figures import SHAPE


def test_the_products_are_those_of_a_block_and_of_the_head() -> None:
    products = list_products(SHAPE, num_tokens=5)
    assert products == [(5, 8, 8)] * 4 + [(5, 8, 16), (5, 8, 16), (5, 16, 8), (5, 8, 32)]


def test_the_head_takes_no_more_rows_than_a_chunk_of_the_loss() -> None:
    rows = chunk_rows(SHAPE.vocab_size)
    assert list_products(SHAPE, num_tokens=rows + 100)[-1] == (rows, 8, 32)


def test_the_rate_is_operations_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later, so that each timed round takes one second."""
    now = iter(range(1000))
    monkeypatch.setattr(ceiling.time, "perf_counter", lambda: float(next(now)))
    rate = measure_ceiling(SHAPE, 5, torch.float32, torch.device("cpu"), seconds=3)
    # Forward and backward, 2 operations for each of 4 x 64 + 3 x 128 + 256 weights and each of 5 tokens.
    assert rate == 4 * 5 * (4 * 64 + 3 * 128 + 256)
