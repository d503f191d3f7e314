"""Samples laid flat in one pass, as packing lays them, give the sum of what each gives alone: loss and gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsft.core.data.packing import pack_sequences
from dsft.core.data.samples import Sample
from dsft.core.memory.plan import ExecutionPlan
from dsft.core.models.device import Device
from dsft.train.batches import MicroBatch, SequenceDataset, flatten, split_into_micro_batches
from dsft.train.loss import sum_target_losses
from tests.engine_models import KINDS, load_pair, write_model
from tests.unit.train.random_samples import make_samples

CPU = Device("cpu", "CPU")
NUM_SAMPLES, LENGTH = 7, 64
Result = tuple[float, dict[str, torch.Tensor]]


@pytest.fixture(params=sorted(KINDS))
def computed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A model of each kind that the engine computes, and the engine."""
    write_model(request.param, tmp_path)
    _, model, engine = load_pair(tmp_path, CPU)
    model.train()
    return model, engine


def run_passes(computed: tuple[Any, Any], passes: Sequence[MicroBatch]) -> Result:
    """Return the summed loss of several passes and the gradients they leave together."""
    model, engine = computed
    engine.lora.clear_gradients()
    total = 0.0
    for batch in passes:
        loss = sum_target_losses(model, batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: Result, expected: Result) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        error = (gradient - expected[1][name]).norm() / expected[1][name].norm()
        assert error < 1e-5, (name, error.item())


@pytest.mark.parametrize("num_recomputed", [0, 3])
def test_flat_samples_give_the_sum_of_each_alone(computed: tuple[Any, Any], num_recomputed: int) -> None:
    computed[1].recompute(num_recomputed)
    data = make_samples(NUM_SAMPLES)
    samples = [data[index] for index in range(NUM_SAMPLES)]
    alone = run_passes(computed, [flatten([sample]) for sample in samples])
    assert_same(run_passes(computed, [flatten(samples)]), alone)
    assert_same(run_passes(computed, [flatten(samples[::-1])]), alone)


def test_packed_sequences_give_the_loss_and_gradients_of_their_samples(computed: tuple[Any, Any]) -> None:
    data = make_samples(NUM_SAMPLES)
    packs = pack_sequences(data.lengths, LENGTH, seed=0)
    assert 2 < len(packs) < NUM_SAMPLES
    two_a_pass = ExecutionPlan(2, 10**6, False, 0, False, 0)
    packed, unpacked = (
        run_passes(computed, split_into_micro_batches([data[index] for index in range(len(data))], two_a_pass))
        for data in (SequenceDataset(data, packs), SequenceDataset(data))
    )
    assert_same(packed, unpacked)


def test_a_sample_sees_nothing_of_the_one_before_it(computed: tuple[Any, Any]) -> None:
    data = make_samples(2)
    silent = Sample(data[0].token_ids, np.zeros_like(data[0].is_target), row=0)
    alone = run_passes(computed, [flatten([data[1]])])
    assert_same(run_passes(computed, [flatten([silent, data[1]])]), alone)
    as_one = Sample(
        np.concatenate([silent.token_ids, data[1].token_ids]),
        np.concatenate([silent.is_target, data[1].is_target]),
        row=0,
    )
    seeing = run_passes(computed, [flatten([as_one])])
    assert abs(seeing[0] / alone[0] - 1) > 1e-4  # what it would be if it did
