"""Which micro-batch of a run is the largest, told from lengths alone: it is tried before the first step."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dsft.core.memory.plan import ExecutionPlan, Workload
from dsft.train.batches import order_of_epoch, split_sequences

_MOST_SEQUENCES = 2_000_000
"""Sequences looked at, in whole epochs and at least one: the order of millions of epochs is no news."""

_MOST_SPLITS = 2000
"""Steps whose split by tokens is tried out: those that promise the largest groups."""


@dataclass(frozen=True)
class StepOrder:
    """The sequences of every optimizer step of a run.

    Attributes:
        lengths: Tokens of each sequence.
        effective_batch_size: Sequences in a step.
        seed: Seed of the order.
        num_steps: Optimizer steps.
    """

    lengths: npt.NDArray[np.int64]
    effective_batch_size: int
    seed: int
    num_steps: int

    @cached_property
    def _epochs(self) -> list[npt.NDArray[np.int64]]:
        """The sequences in the order of each epoch; the last epoch may be cut short."""
        count, size = len(self.lengths), self.effective_batch_size
        steps_left = self.num_steps
        epochs: list[npt.NDArray[np.int64]] = []
        while steps_left > 0 and len(epochs) * count < _MOST_SEQUENCES:
            epochs.append(order_of_epoch(count, self.seed, len(epochs))[: steps_left * size])
            steps_left -= -(-count // size)
        return epochs

    def workload(self, longest_validation: int) -> Workload:
        """Return what plans are made for."""
        totals = np.concatenate([self._sum_parts(order, self.effective_batch_size) for order in self._epochs])
        return Workload(
            effective_batch_size=self.effective_batch_size,
            longest_sequence=int(self.lengths.max()),
            mean_step_tokens=float(totals.mean()),
            max_step_tokens=int(totals.max()),
            longest_validation=longest_validation,
        )

    def largest_micro_batch(self, plan: ExecutionPlan) -> list[int]:
        """Return the sequences of the micro-batch with the most tokens in the whole run."""
        find = self._largest_by_tokens if plan.splits_by_tokens else self._largest_by_number
        return max((find(order, plan) for order in self._epochs), key=lambda group: int(self.lengths[group].sum()))

    def _largest_by_number(self, order: npt.NDArray[np.int64], plan: ExecutionPlan) -> list[int]:
        places = np.arange(len(order)) % self.effective_batch_size
        starts = np.flatnonzero(places % plan.micro_batch_size == 0)
        largest = int(np.argmax(np.add.reduceat(self.lengths[order], starts)))
        end = starts[largest + 1] if largest + 1 < len(starts) else len(order)
        return [int(index) for index in order[starts[largest] : end]]

    def _largest_by_tokens(self, order: npt.NDArray[np.int64], plan: ExecutionPlan) -> list[int]:
        size = self.effective_batch_size
        totals = self._sum_parts(order, size)
        longest = np.maximum.reduceat(self.lengths[order], np.arange(0, len(order), size))
        # A group has at least an even share of its step's tokens, and at least its longest sequence.
        promise = np.maximum(totals / np.ceil(totals / plan.micro_batch_tokens), longest)
        most, found = -1, []
        for step in np.argsort(-promise, kind="stable")[:_MOST_SPLITS]:
            indices = order[step * size : (step + 1) * size]
            lengths = self.lengths[indices].tolist()
            for group in split_sequences(lengths, plan):
                tokens = sum(lengths[index] for index in group)
                if tokens > most:
                    most, found = tokens, [int(indices[index]) for index in group]
        return found

    def _sum_parts(self, order: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
        sums: npt.NDArray[np.int64] = np.add.reduceat(self.lengths[order], np.arange(0, len(order), size))
        return sums
