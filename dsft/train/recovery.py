"""Running out of GPU memory in a step: free what it took, take the next smaller plan, and do the same step again."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from dsft.core.errors import DoesNotFitError, is_gpu_out_of_memory
from dsft.core.memory.plan import ExecutionPlan
from dsft.train.restore import page_optimizer_state

Result = TypeVar("Result")


class Shrink(Protocol):
    """Finds the next smaller plan."""

    def __call__(self, failed: ExecutionPlan, free_bytes: int, /) -> ExecutionPlan:
        """Return it, given the plan that failed and what a step could have now.

        Raises:
            DoesNotFitError: There is nothing smaller.
        """


@dataclass(frozen=True)
class PlanChange:
    """A plan was given up for a smaller one.

    Attributes:
        step: The optimizer step that ran out of memory, counted from 1; 0 in the rehearsal before the first.
        failed: The plan it ran with.
        plan: The plan it is done again with.
        reason: What the allocator said.
    """

    step: int
    failed: ExecutionPlan
    plan: ExecutionPlan
    reason: str


class PlanRunner:
    """Runs work under a plan, and under smaller ones where it does not fit.

    Args:
        recompute: Lets so many of the first blocks recompute.
        plan: The first plan.
        shrink: Finds the next smaller plan; None lets an out-of-memory error through.
        on_change: Told of every change.
    """

    def __init__(
        self,
        recompute: Callable[[int], None],
        plan: ExecutionPlan,
        shrink: Shrink | None,
        on_change: Callable[[PlanChange], None],
    ) -> None:
        self._recompute = recompute
        self._shrink = shrink
        self._on_change = on_change
        self._optimizer: Any = None
        self.plan = plan
        recompute(plan.num_recomputed)

    def take_optimizer(self, optimizer: Any) -> None:
        """Let the optimizer's state page, or not, as the plan says; before it has any."""
        self._optimizer = optimizer
        if hasattr(optimizer, "is_paged"):  # bitsandbytes'
            optimizer.is_paged = self.plan.pages_optimizer

    def run(self, work: Callable[[], Result], step: int) -> Result:
        """Return what `work` returns, repeated under smaller plans as long as it runs out of memory.

        Each repetition begins with the random state of the first: dropout, where there is any, falls alike on the same
        micro-batches.

        Raises:
            DoesNotFitError: It ran out of memory under the smallest plan too.
        """
        random_state = get_random_state()
        while True:
            try:
                return work()
            except RuntimeError as error:  # a full host is no reason for a smaller plan on the GPU
                shrink = self._shrink
                if shrink is None or not is_gpu_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Outside the except clause: the error's traceback keeps the step's tensors alive.
            release_memory()
            self._take(self._next_plan(shrink, reason), step, reason)
            set_random_state(random_state)

    def _next_plan(self, shrink: Shrink, reason: str) -> ExecutionPlan:
        free_bytes = measure_free_bytes()
        if self._optimizer is not None and not self._optimizer.state and not self.plan.pages_optimizer:
            free_bytes -= _state_bytes(self._optimizer)  # still to be made
        try:
            return shrink(self.plan, free_bytes)
        except DoesNotFitError as error:
            raise DoesNotFitError(f"{error.found} PyTorch said: {reason}", error.fix) from None

    def _take(self, plan: ExecutionPlan, step: int, reason: str) -> None:
        failed, self.plan = self.plan, plan
        self._recompute(plan.num_recomputed)
        if plan.pages_optimizer and not failed.pages_optimizer and hasattr(self._optimizer, "is_paged"):
            self._optimizer.is_paged = True
            page_optimizer_state(self._optimizer)
            release_memory()
        self._on_change(PlanChange(step, failed, plan, reason))


def _state_bytes(optimizer: Any) -> int:
    # Two float32 moments of each weight.
    return sum(8 * weight.numel() for group in optimizer.param_groups for weight in group["params"])


def measure_free_bytes() -> int:
    """Return what PyTorch could give out now: what the device and its limit leave, and what it holds unused."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    limit = round(torch.cuda.get_per_process_memory_fraction() * total)
    return max(0, min(free, limit - reserved)) + reserved - torch.cuda.memory_allocated()


def release_memory() -> None:
    """Give everything that nothing needs back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reserve_optimizer_state(optimizer: Any) -> None:
    """Let an optimizer make its state now, by a step that changes nothing.

    The gradients are zero and so is the learning rate; the count of steps is set back. State made in the first real
    step could fail half-way through it, with some weights changed, and would lie where activations were.

    Args:
        optimizer: A torch or bitsandbytes AdamW without state, whose parameters have zero gradients.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        # torch's fused optimizers may hold the rate as a tensor.
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    try:
        optimizer.step()
    except BaseException:
        optimizer.state.clear()  # some of it, with steps counted
        raise
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for state in optimizer.state.values():
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def get_random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the state of PyTorch's generators, of the CPU and of the GPU where it is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Set the state back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
