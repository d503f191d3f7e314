"""Optimizer and schedule in a checkpoint: tensor by tensor in the model's order, whatever the order in memory.

So the files are those of runs whose weights lay apart, and a run may go on with its weights in another order.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsft.core.engine.flat_lora import FlatLora
from dsft.core.errors import CheckpointError

OPTIMIZER_FILE = "optimizer.pt"
SCHEDULE_FILE = "scheduler.pt"


def write_optimizer(
    checkpoint: Path, optimizer: Any, schedule: Any, lora: FlatLora, weights: Sequence[torch.nn.Parameter]
) -> None:
    """Write the state of an optimizer of `lora.parameter`, and of its learning rate.

    Args:
        checkpoint: The folder.
        optimizer: A torch or bitsandbytes AdamW.
        schedule: Sets its learning rate.
        lora: What it steps.
        weights: The parts of that in the order of the file: the model's.
    """
    saved = optimizer.state_dict()
    state = {
        index: _take_part(flat, lora, weight)
        for flat in saved["state"].values()
        for index, weight in enumerate(weights)
    }
    indices = list(range(len(weights)))
    # transformers makes a second group, of what does not decay: it is empty.
    groups = [group | {"params": indices if group["params"] else []} for group in saved["param_groups"]]
    torch.save({"state": state, "param_groups": groups}, checkpoint / OPTIMIZER_FILE)
    torch.save(schedule.state_dict(), checkpoint / SCHEDULE_FILE)


def read_optimizer(
    checkpoint: Path, optimizer: Any, schedule: Any, lora: FlatLora, weights: Sequence[torch.nn.Parameter]
) -> None:
    """Read what `write_optimizer` wrote.

    Args:
        checkpoint: The folder.
        optimizer: An optimizer of the same kind.
        schedule: Sets its learning rate.
        lora: What it steps; the order in it may be another.
        weights: Its parts in the order of the file.

    Raises:
        CheckpointError: The file holds the state of other weights.
    """
    path = checkpoint / OPTIMIZER_FILE
    saved = torch.load(path, map_location="cpu", weights_only=True)
    states = saved["state"]
    try:
        if len(states) not in (0, len(weights)):
            raise ValueError(f"{len(states)} states for {len(weights)} weights")
        state = {0: _join([states[index] for index in range(len(weights))], lora, weights)} if states else {}
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds the optimizer state of other weights than this model's.",
            "Resume with the settings the run was started with, or start anew with --overwrite.",
        ) from error
    groups = [group | {"params": [0] if group["params"] else []} for group in saved["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    schedule.load_state_dict(torch.load(checkpoint / SCHEDULE_FILE, weights_only=True))


def _take_part(flat: Mapping[str, Any], lora: FlatLora, weight: torch.nn.Parameter) -> dict[str, Any]:
    def take(value: Any) -> Any:
        if isinstance(value, dict):  # bitsandbytes puts its moments one level deeper
            return _take_part(value, lora, weight)
        return lora.view_of(value, weight) if _is_moment(value) else value

    return {name: take(value) for name, value in flat.items()}


def _join(states: Sequence[Mapping[str, Any]], lora: FlatLora, weights: Sequence[torch.nn.Parameter]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        if isinstance(first, dict):
            joined[name] = _join(values, lora, weights)
        elif _is_moment(first):
            joined[name] = torch.zeros(lora.parameter.shape, dtype=first.dtype)
            for value, weight in zip(values, weights, strict=True):
                if value.shape != weight.shape:
                    raise ValueError(f"{name} has the shape {tuple(value.shape)}, the weight {tuple(weight.shape)}")
                lora.view_of(joined[name], weight).copy_(value)
        else:
            joined[name] = first  # the number of steps, the same for all
    return joined


def _is_moment(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
