import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from dsft.core.data.samples import Sample
from dsft.core.memory.plan import ExecutionPlan
from dsft.train.batches import (
    EffectiveBatchLoader,
    EffectiveBatchSampler,
    SequenceDataset,
    flatten,
    group_by_tokens,
    split_into_micro_batches,
)
from tests.unit.train.random_samples import make_samples


def sample(ids: list[int], first_target: int) -> Sample:
    return Sample(np.array(ids), np.arange(len(ids)) >= first_target, 0)


def test_flatten_places_each_target_behind_the_token_that_predicts_it():
    batch = flatten([sample([10, 11, 12], 1), sample([20, 21, 22, 23], 3)])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 23]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.sample_bounds.tolist() == [0, 3, 7]
    assert batch.longest == 4
    assert batch.logit_positions.tolist() == [0, 1, 5]
    assert batch.labels.tolist() == [11, 12, 23]


def test_the_first_token_of_a_sample_is_never_predicted_from_the_sample_before_it():
    batch = flatten([sample([10, 11], 0), sample([20, 21], 0)])
    assert batch.labels.tolist() == [11, 21]
    assert batch.logit_positions.tolist() == [0, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 99])
def test_micro_batches_hold_every_sample_once_in_order(size: int):
    samples = make_samples(7)
    batch = [[samples[0]], [samples[1], samples[2]], [samples[3]], [samples[4]], [samples[5], samples[6]]]
    parts = split_into_micro_batches(batch, ExecutionPlan(size, 10**6, False, 0, False, 0))
    assert len(parts) == -(-5 // size)
    joined = torch.cat([part.input_ids[0] for part in parts])
    assert joined.tolist() == np.concatenate([samples[i].token_ids for i in range(7)]).tolist()


def test_an_epoch_visits_every_sequence_once_and_epochs_differ():
    sampler = EffectiveBatchSampler(10, 4, seed=3)
    sampler.set_epoch(0)
    first = list(sampler)
    assert [len(batch) for batch in first] == [4, 4, 2] and len(sampler) == 3
    assert sorted(sum(first, [])) == list(range(10))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_yields_the_same_batches_with_and_without_workers(num_workers: int):
    samples = make_samples(9)
    loader = EffectiveBatchLoader(SequenceDataset(samples), effective_batch_size=4, seed=1, num_workers=num_workers)
    before = torch.random.get_rng_state()
    loader.set_epoch(2)
    rows = [[sequence[0].row for sequence in batch] for batch in loader]
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator must not move"
    sampler = EffectiveBatchSampler(9, 4, seed=1)
    sampler.set_epoch(2)
    assert rows == list(sampler)


def test_packs_become_sequences():
    samples = make_samples(4)
    sequences = SequenceDataset(samples, [np.array([2, 0]), np.array([1, 3])])
    assert len(sequences) == 2
    assert [part.row for part in sequences[0]] == [2, 0]


def test_groups_hold_every_sample_once_and_never_more_tokens_than_allowed():
    lengths = np.array([5, 60, 7, 7, 30, 3, 100, 1])
    groups = group_by_tokens(lengths, max_tokens=64)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        assert lengths[group].sum() <= 64 or len(group) == 1


ORPHANING = """
import os, signal
from dsft.train.batches import EffectiveBatchLoader, SequenceDataset
from tests.unit.train.random_samples import make_samples
loader = EffectiveBatchLoader(SequenceDataset(make_samples(8)), effective_batch_size=2, seed=0, num_workers=1)
batches = iter(loader)
next(batches)
print(batches._workers[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_does_not_outlive_its_parent():
    """It would hold the lock of the run's folders."""
    with subprocess.Popen([sys.executable, "-c", ORPHANING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert process.wait(timeout=60) == -signal.SIGKILL
    deadline_s = time.monotonic() + 4  # torch's own watchdog looks every 5
    while is_running(worker) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(process_id: int) -> bool:
    """A process that has ended stays as a zombie until its new parent, some init, looks at it."""
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
