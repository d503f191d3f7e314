"""Reading a checkpoint back: adapter weights, trainer state, and optimizer state into the memory it belongs in."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerState

from dsft.core.errors import CheckpointError
from dsft.train.checkpoint import checkpoint_step

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINER_STATE = "trainer_state.json"


def page_optimizer_state(optimizer: Any) -> None:
    """Move a paged optimizer's loaded state back into pageable memory.

    bitsandbytes 0.50 loads it into plain GPU memory, so a resumed run would need more than the one before it.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = buffer.copy_(state[name])


def load_adapter_weights(model: Any, checkpoint: Path) -> None:
    """Load LoRA weights into a model, every tensor or none.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = load_file(checkpoint / ADAPTER_WEIGHTS)
    present = get_peft_model_state_dict(model)
    for name in sorted(saved.keys() | present.keys()):
        if name not in saved or name not in present or saved[name].shape != present[name].shape:
            raise CheckpointError(
                f"{checkpoint / ADAPTER_WEIGHTS} does not fit this model: tensor {name} is "
                f"{'missing' if name not in saved else 'unknown' if name not in present else 'of another shape'}.",
                "Resume with the settings the run was started with, or start anew with --overwrite.",
            )
    set_peft_model_state_dict(model, saved)


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Read the state of a checkpoint: its step, its log and its best validation loss."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
    if state.global_step != checkpoint_step(checkpoint):
        raise CheckpointError(
            f"{checkpoint / TRAINER_STATE} says step {state.global_step}.", "Remove that checkpoint and --resume again."
        )
    return state
