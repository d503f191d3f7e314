"""The rate of a model's own matrix products alone, sustained on this device: what a training step is held against."""

import time
from collections.abc import Callable

import torch

from dsft.core.memory.loss_chunks import chunk_rows
from dsft.core.memory.model_shape import ModelShape

_ROUND_S = 0.05
"""Products are queued in rounds of about this time, so that waiting for their end costs nothing that shows."""


def measure_ceiling(
    shape: ModelShape, num_tokens: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> float:
    """Return the operations in a second of the products a training step can't do without.

    Each linear layer of a block, and the output head on a chunk of rows as the loss takes it, multiplies random values
    forward (x·Wᵀ) and backward (g·W), again and again for `seconds`: long enough for the card to come to the clock it
    can keep.

    Args:
        shape: The model.
        num_tokens: Tokens of a micro-batch.
        dtype: Compute type.
        device: Where.
        seconds: How long.
    """
    products, flops = _make_products(shape, num_tokens, dtype, device)

    def run(num_rounds: int) -> float:
        started_s = time.perf_counter()
        for _ in range(num_rounds):
            for product in products:
                product()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started_s

    run(1)  # the first call of each product chooses its kernel
    num_rounds = max(1, round(_ROUND_S / max(run(1), 1e-6)))
    rounds, spent_s = 0, 0.0
    while spent_s < seconds or rounds == 0:
        spent_s += run(num_rounds)
        rounds += num_rounds
    return flops * rounds / spent_s


def list_products(shape: ModelShape, num_tokens: int) -> list[tuple[int, int, int]]:
    """Return (rows, inputs, outputs) of each linear layer of a block and of the head."""
    block = [(num_tokens, linear.num_inputs, linear.num_outputs) for linear in shape.block_linears]
    return [*block, (min(num_tokens, chunk_rows(shape.vocab_size)), shape.hidden_size, shape.vocab_size)]


def _make_products(
    shape: ModelShape, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Callable[[], torch.Tensor]], int]:
    products: list[Callable[[], torch.Tensor]] = []
    flops = 0
    for rows, inputs, outputs in list_products(shape, num_tokens):
        values = torch.randn(rows, inputs, dtype=dtype, device=device)
        weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
        gradient = torch.randn(rows, outputs, dtype=dtype, device=device)
        forward, backward = torch.empty_like(gradient), torch.empty_like(values)
        products += [
            lambda out=forward, x=values, w=weight: torch.mm(x, w.t(), out=out),  # type: ignore[misc]
            lambda out=backward, g=gradient, w=weight: torch.mm(g, w, out=out),  # type: ignore[misc]
        ]
        flops += 4 * rows * inputs * outputs
    return products, flops
