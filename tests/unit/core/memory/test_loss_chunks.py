"""The size of a chunk of logits."""

import pytest

from dsft.core.memory.loss_chunks import BYTES_PER_LOGIT, LOSS_CHUNK_BYTES, chunk_rows


def test_a_chunk_of_deepseek_coder() -> None:
    # 256 MiB / (6 x 32,256) is 1,387.0 rows; the multiple of 128 below it is 1,280.
    assert chunk_rows(32_256) == 1_280


@pytest.mark.parametrize("vocab_size", [1, 128, 32_256, 151_936, 349_525, 349_526, 10**6, 2_796_202, 2_796_203, 10**9])
def test_a_chunk_fits_its_bytes_unless_it_has_the_fewest_rows(vocab_size: int) -> None:
    rows = chunk_rows(vocab_size)
    assert rows == 16 or rows * vocab_size * BYTES_PER_LOGIT <= LOSS_CHUNK_BYTES
    assert rows % 128 == 0 or 16 <= rows < 128


def test_a_larger_vocabulary_has_no_larger_chunk() -> None:
    rows = [chunk_rows(vocab_size) for vocab_size in range(1_000, 3_000_000, 997)]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == 16
