"""From samples to the flat micro-batches the model sees, and the order in which an epoch visits them."""

import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dsft.core.data.samples import Sample, TokenizedDataset
from dsft.core.memory.plan import ExecutionPlan

EffectiveBatch = list[list[Sample]]
"""The sequences of one optimizer step; a sequence is one sample, or with packing several."""


@dataclass(frozen=True)
class MicroBatch:
    """Several samples as one flat row of tokens; no padding, and no sample sees another.

    Attributes:
        input_ids: int64 [1, num_tokens].
        position_ids: int64 [1, num_tokens]; starts at 0 in each sample.
        sample_bounds: int32 [num_samples + 1]; where each sample begins and ends.
        longest: Tokens of the longest sample.
        logit_positions: int64 [num_targets]; the positions whose logits predict a target, i.e. one before it.
        labels: int64 [num_targets]; the target token ids.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sample_bounds: torch.Tensor
    longest: int
    logit_positions: torch.Tensor
    labels: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return self.input_ids.shape[1]

    @property
    def num_targets(self) -> int:
        """Tokens that carry loss."""
        return self.labels.shape[0]

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the batch on a device."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return MicroBatch(
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            sample_bounds=move(self.sample_bounds),
            longest=self.longest,
            logit_positions=move(self.logit_positions),
            labels=move(self.labels),
        )


def flatten(samples: Sequence[Sample]) -> MicroBatch:
    """Lay samples one after the other.

    The first token of a sample is never a target: nothing stands before it that could predict it.
    """
    token_ids = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64, copy=False)
    lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    is_target = np.concatenate([sample.is_target for sample in samples])
    is_target[bounds[:-1]] = False
    targets = np.flatnonzero(is_target)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(token_ids).unsqueeze(0),
        position_ids=torch.from_numpy(positions).unsqueeze(0),
        sample_bounds=torch.from_numpy(bounds.astype(np.int32)),
        longest=int(lengths.max()),
        logit_positions=torch.from_numpy(targets - 1),
        labels=torch.from_numpy(token_ids[targets]),
    )


def split_into_micro_batches(batch: EffectiveBatch, plan: ExecutionPlan) -> list[MicroBatch]:
    """Split the sequences of an optimizer step into micro-batches as the plan says."""
    lengths = [sum(len(sample.token_ids) for sample in sequence) for sequence in batch]
    return [flatten([sample for index in group for sample in batch[index]]) for group in split_sequences(lengths, plan)]


def split_sequences(lengths: Sequence[int], plan: ExecutionPlan) -> list[list[int]]:
    """Split sequences into the groups that make micro-batches.

    By number: so many at a time, in order. By tokens: into as few groups as their tokens need, filled evenly (each
    sequence, longest first, into the group with the fewest tokens), because the largest group decides the memory.

    Returns:
        The indices in each group.
    """
    if not plan.splits_by_tokens:
        size = plan.micro_batch_size
        return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    num_groups = max(1, math.ceil(sum(lengths) / plan.micro_batch_tokens))
    while True:
        groups: list[list[int]] = [[] for _ in range(num_groups)]
        loads = [0] * num_groups
        for index in longest_first:
            emptiest = loads.index(min(loads))
            groups[emptiest].append(index)
            loads[emptiest] += lengths[index]
        fits = all(
            load <= plan.micro_batch_tokens or len(group) == 1 for load, group in zip(loads, groups, strict=True)
        )
        if fits or num_groups == len(lengths):
            return [sorted(group) for group in groups if group]
        num_groups += 1


class SequenceDataset(Dataset[list[Sample]]):
    """The sequences of a run: one sample each, or packs of samples.

    Args:
        samples: All tokenized samples.
        packs: Sample indices of each packed sequence; None makes each sample a sequence.
    """

    def __init__(self, samples: TokenizedDataset, packs: Sequence[npt.NDArray[np.int64]] | None = None) -> None:
        self._samples = samples
        self._packs = packs

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, int64 [num_sequences]."""
        if self._packs is None:
            return self._samples.lengths
        return np.array([int(self._samples.lengths[pack].sum()) for pack in self._packs], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples) if self._packs is None else len(self._packs)

    def __getitem__(self, index: int) -> list[Sample]:
        if self._packs is None:
            return [self._samples[index]]
        return [self._samples[int(sample)] for sample in self._packs[index]]


def order_of_epoch(num_sequences: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order in which an epoch, counted from 0, visits the sequences."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


class EffectiveBatchSampler(Sampler[list[int]]):
    """Yields the sequence indices of each optimizer step, in an order fixed by seed and epoch alone.

    The last batch of an epoch may be smaller; no sequence is left out.
    """

    def __init__(self, num_sequences: int, effective_batch_size: int, seed: int) -> None:
        self._num_sequences = num_sequences
        self._effective_batch_size = effective_batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, that the next iteration visits."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self._num_sequences / self._effective_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = order_of_epoch(self._num_sequences, self._seed, self._epoch)
        for start in range(0, self._num_sequences, self._effective_batch_size):
            yield order[start : start + self._effective_batch_size].tolist()


class EffectiveBatchLoader(DataLoader[list[Sample]]):
    """Loads whole effective batches; the training step splits them, so that a plan may change between two steps."""

    def __init__(
        self, sequences: SequenceDataset, *, effective_batch_size: int, seed: int, num_workers: int = 0
    ) -> None:
        sampler = EffectiveBatchSampler(len(sequences), effective_batch_size, seed)
        super().__init__(
            sequences,
            batch_sampler=sampler,
            collate_fn=_keep_list,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_obey_parent_alone,
            # Signals and the parent's id are a worker's own business only where it is a fork of this process.
            multiprocessing_context="fork" if num_workers > 0 else None,
            # Its own generator: starting workers must not advance the global one, or a resumed run would differ.
            generator=torch.Generator().manual_seed(seed),
        )
        self._epoch_sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration visits; transformers' Trainer calls this."""
        self._epoch_sampler.set_epoch(epoch)


def group_by_tokens(lengths: npt.NDArray[np.int64], max_tokens: int) -> list[npt.NDArray[np.int64]]:
    """Group samples, longest first, so that no group of several has more than `max_tokens` tokens.

    Used for validation: with `max_tokens` no larger than what a training micro-batch holds, a validation pass, which
    keeps no activations, needs less memory than training.

    Returns:
        Index arrays; every sample is in exactly one.
    """
    groups: list[list[int]] = []
    room = 0
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(int(index))
        room -= length
    return [np.array(group, dtype=np.int64) for group in groups]


def _keep_list(sequences: list[Any]) -> list[Any]:
    return sequences


def _obey_parent_alone(_worker: int) -> None:
    """Let a worker end by its parent's signals only.

    Ctrl-C, service managers and schedulers signal all processes of a run, and a worker that ends before the step does
    would take the checkpoint with it.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    parent = os.getppid()

    def wait_for_parent() -> None:
        sender = None
        # A worker holds what it inherited, the lock of the output folder too: it must not outlive its parent.
        while sender != parent and os.getppid() == parent:
            came = signal.sigtimedwait(signals, 1)
            sender = came.si_pid if came is not None else None
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
