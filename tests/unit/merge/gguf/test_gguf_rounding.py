"""Weights into bytes, against the gguf package's own rounding and NumPy's."""

import gguf
import numpy as np
import pytest
import torch

from dsft.core.errors import DsftError
from dsft.merge.gguf.rounding import round_rows, rounded_bytes


def test_float16_is_rounded_to_nearest_even_denormals_too() -> None:
    torch.manual_seed(0)
    exponents = torch.randint(-30, 15, (64, 96)).float()
    rows = torch.randn(64, 96) * torch.exp2(exponents)
    rows[0, :4] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, -0.0])  # three ties, and the sign of zero
    assert bytes(round_rows(rows, "f16", "t")) == rows.numpy().astype(np.float16).tobytes()


def test_q8_0_is_what_gguf_makes() -> None:
    torch.manual_seed(0)
    rows = torch.randn(33, 64) * torch.exp2(torch.randint(-20, 10, (33, 1)).float())
    rows[1] = 0
    rows[2, :32] = torch.arange(32) * 0.5 / 127  # ties of a step
    expected = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert bytes(round_rows(rows, "q8_0", "t")) == expected.tobytes()
    # A piece of larger rows, as a slice gives it.
    assert bytes(round_rows(torch.cat((rows, rows), 1)[:, 64:], "q8_0", "t")) == expected.tobytes()


def test_q8_0_of_denormal_weights_is_zero_and_no_warning() -> None:
    data = round_rows(torch.full((1, 32), 1e-41), "q8_0", "t")
    assert not gguf.dequantize(data.reshape(1, 34), gguf.GGMLQuantizationType.Q8_0).any()


def test_the_largest_float16_fits_and_the_next_does_not() -> None:
    assert len(round_rows(torch.full((1, 2), 65504.0), "f16", "t")) == 4
    with pytest.raises(DsftError, match="too large for f16"):
        round_rows(torch.full((1, 2), 65520.0), "f16", "t")


@pytest.mark.parametrize(("rounding", "expected"), [("f32", 4 * 192), ("f16", 2 * 192), ("q8_0", 34 * 6)])
def test_bytes_are_those_of_the_rounding(rounding, expected) -> None:
    assert rounded_bytes((3, 64), rounding) == expected == len(round_rows(torch.ones(3, 64), rounding, "t"))
