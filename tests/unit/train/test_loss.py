"""Output head and cross-entropy in chunks: the values and gradients of torch's, with one chunk of logits alive."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dsft.core.data.samples import Sample
from dsft.core.memory.loss_chunks import BYTES_PER_LOGIT
from dsft.core.models.attention import PER_SAMPLE
from dsft.core.models.load import TRAINABLE_FAMILIES
from dsft.train import loss as loss_module
from dsft.train.batches import flatten
from dsft.train.loss import sum_target_losses
from tests.unit.core.memory.live_bytes import LiveBytes
from tests.unit.core.models.test_families import make_model
from tests.unit.train.random_samples import make_samples

CHUNK, VOCABULARY, HIDDEN = 16, 50, 24
NUM_TARGETS = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocab_size: CHUNK)


def make_head(num_targets: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(num_targets)
    states = (scale * torch.randn(num_targets, HIDDEN)).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype)
    return states, weight, torch.randint(VOCABULARY, (num_targets,))


def head_loss(
    states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, is_fused: bool = False
) -> torch.Tensor:
    return loss_module._HeadLoss.apply(states, weight, labels, is_fused)


def exact(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient by torch's cross-entropy over all logits, in float64."""
    wide = states.detach().double().requires_grad_()
    total = cross_entropy(wide @ weight.double().t(), labels, reduction="sum")
    total.backward()
    assert wide.grad is not None
    return total.detach(), wide.grad


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("num_targets", NUM_TARGETS)
def test_value_and_gradient_are_those_of_cross_entropy(num_targets: int, is_fused: bool) -> None:
    states, weight, labels = make_head(num_targets, torch.float32)
    total = head_loss(states, weight, labels, is_fused=is_fused)
    (3 * total).backward()
    value, gradient = exact(states, weight, labels)
    assert total.dtype == torch.float32 and total.shape == ()
    torch.testing.assert_close(total.double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states.grad.double(), 3 * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_targets", NUM_TARGETS)
def test_16_bits_stay_close(num_targets: int) -> None:
    states, weight, labels = make_head(num_targets, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        total = head_loss(states, weight, labels)
    total.backward()
    value, gradient = exact(states, weight, labels)
    assert total.dtype == torch.float32 and states.grad.dtype == torch.bfloat16
    # Logits of size 5 are rounded to 8 bits: by 1 % each, both ways.
    torch.testing.assert_close(total.double(), value, rtol=5e-3, atol=2e-2)
    assert (states.grad.double() - gradient).norm() <= 0.01 * gradient.norm()


def test_large_logits_do_not_overflow() -> None:
    states, weight, labels = make_head(2 * CHUNK, torch.float32, scale=1e3)
    total = head_loss(states, weight, labels)
    total.backward()
    value, gradient = exact(states, weight, labels)
    torch.testing.assert_close(total.double(), value, rtol=1e-5, atol=0)
    assert torch.isfinite(states.grad).all() and gradient.norm() > 0


def test_the_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, labels = make_head(3 * CHUNK + 5, torch.float32)
    results = []
    for rows in (CHUNK, 1, 1000):
        monkeypatch.setattr(loss_module, "chunk_rows", lambda vocab_size, rows=rows: rows)
        states.grad = None
        total = head_loss(states, weight, labels)
        total.backward()
        results.append((total.detach(), states.grad))
    for total, gradient in results[1:]:
        torch.testing.assert_close(total, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


@pytest.mark.parametrize(("dtype", "bytes_per_logit"), [(torch.bfloat16, BYTES_PER_LOGIT), (torch.float32, 4)])
@pytest.mark.parametrize("trains", [True, False])
def test_one_chunk_of_logits_is_alive_at_a_time(
    dtype: torch.dtype, bytes_per_logit: int, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, rows = 4096, 64
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocab_size: rows)
    weight, labels = torch.randn(vocabulary, 4).to(dtype), torch.randint(vocabulary, (10 * rows,))
    states = torch.randn(10 * rows, 4).to(dtype).requires_grad_(trains)
    live = LiveBytes(weight, labels, states)
    with live:
        total = head_loss(states, weight, labels)
        if trains:
            total.backward()
    logits = rows * vocabulary * bytes_per_logit
    assert logits <= live.peak_bytes < 1.05 * logits


def test_without_gradients_none_is_made() -> None:
    states, weight, labels = make_head(3 * CHUNK, torch.float32)
    training = LiveBytes(weight, labels, states)
    with training:
        total = head_loss(states, weight, labels)
    gradient_bytes = 3 * CHUNK * HIDDEN * 4
    assert total.requires_grad and training.live_bytes == 512 + gradient_bytes  # the loss, and the gradient
    with torch.no_grad():
        states = states * 1  # as what a model returns in a validation pass
        validating = LiveBytes(weight, labels, states)
        with validating:
            same = head_loss(states, weight, labels)
    assert not same.requires_grad and validating.live_bytes == 512
    assert validating.peak_bytes <= training.peak_bytes - gradient_bytes
    torch.testing.assert_close(same, total.detach())


def test_the_head_itself_gets_no_gradient() -> None:
    states, weight, labels = make_head(CHUNK, torch.float32)
    head_loss(states, weight.requires_grad_(), labels).backward()
    assert weight.grad is None and states.grad is not None


def sum_plainly(model: Any, samples: list[Sample]) -> torch.Tensor:
    """Each sample alone through the model's own forward pass, all logits."""
    total = torch.zeros(())
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)[None]
        labels = torch.where(torch.from_numpy(sample.is_target), ids[0], -100)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return total


@pytest.mark.parametrize("family", sorted(TRAINABLE_FAMILIES))
def test_the_loss_of_every_family_is_that_of_its_own_logits(family: str) -> None:
    samples = [make_samples(4)[index] for index in range(4)]
    batch = flatten(samples)
    assert batch.num_targets > CHUNK  # more than one chunk
    totals, gradients = [], []
    for attention in (PER_SAMPLE, "eager"):
        model = make_model(family, attention).requires_grad_(False)
        if family == "granite":
            model.config.logits_scaling = 8.0
        weights = model.model.layers[0].self_attn.o_proj.weight.requires_grad_()
        total = sum_target_losses(model, batch) if attention == PER_SAMPLE else sum_plainly(model, samples)
        total.backward()
        totals.append(total.detach())
        gradients.append(weights.grad)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert gradients[0].abs().max() > 1e-3


def test_a_batch_without_targets_has_no_loss() -> None:
    model = make_model("llama", PER_SAMPLE)
    batch = flatten([Sample(np.arange(5), np.zeros(5, dtype=bool), 0)])
    total = sum_target_losses(model, batch)
    assert total.item() == 0.0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
