"""Which micro-batch of a run is the largest, told from lengths alone: it is tried before the first step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsft.core.memory.plan import ExecutionPlan, Workload
from dsft.train.batches import order_of_epoch, split_sequences

_MOST_STEPS_LOOKED_AT = 2000


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

    def _steps(self) -> list[npt.NDArray[np.int64]]:
        size, count = self.effective_batch_size, len(self.lengths)
        per_epoch = -(-count // size)
        steps: list[npt.NDArray[np.int64]] = []
        for epoch in range(-(-self.num_steps // per_epoch)):
            order = order_of_epoch(count, self.seed, epoch)
            steps += [order[start : start + size] for start in range(0, count, size)]
        return steps[: self.num_steps]

    def workload(self, longest_validation: int) -> Workload:
        """Return what plans are made for."""
        totals = [int(self.lengths[step].sum()) for step in self._steps()]
        return Workload(
            effective_batch_size=self.effective_batch_size,
            longest_sequence=int(self.lengths.max()),
            mean_step_tokens=sum(totals) / len(totals),
            max_step_tokens=max(totals),
            longest_validation=longest_validation,
        )

    def largest_micro_batch(self, plan: ExecutionPlan) -> list[int]:
        """Return the sequences of the micro-batch with the most tokens in the whole run."""
        steps = self._steps()
        if len(steps) > _MOST_STEPS_LOOKED_AT:
            # The steps whose even share of their tokens is largest; groups differ little from the share.
            totals = np.array([self.lengths[step].sum() for step in steps])
            shares = totals / np.ceil(totals / plan.micro_batch_tokens)
            steps = [steps[index] for index in np.argsort(-shares, kind="stable")[:_MOST_STEPS_LOOKED_AT]]
        largest: list[int] = []
        most = -1
        for step in steps:
            lengths = self.lengths[step].tolist()
            for group in split_sequences(lengths, plan):
                tokens = sum(lengths[index] for index in group)
                if tokens > most:
                    most, largest = tokens, [int(step[index]) for index in group]
        return largest
