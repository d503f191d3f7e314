"""The two ways a step goes through a model's blocks, and what each part of a step takes on them."""

from collections.abc import Callable
from dataclasses import dataclass

from dsft.core.memory import engine_path, plain_path
from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.pass_size import PassSize
from dsft.core.memory.tape import Segment

Part = Callable[[ModelShape, PassSize], Segment]


@dataclass(frozen=True)
class BlockPath:
    """The parts of a step, each above the memory it begins with.

    Attributes:
        block_forward: The forward pass of a block that keeps its activations.
        recomputed_forward: That of a block that recomputes, or of one in a validation pass.
        block_backward: The backward pass of a block whose activations are there.
        recomputed_backward: That of a block that runs forward once more first.
        loss_and_head: The final norm, output head and loss, forward and backward.
    """

    block_forward: Part
    recomputed_forward: Part
    block_backward: Part
    recomputed_backward: Part
    loss_and_head: Part


PLAIN_PATH = BlockPath(
    plain_path.block_forward,
    plain_path.recomputed_forward,
    plain_path.block_backward,
    plain_path.recomputed_backward,
    plain_path.loss_and_head,
)
"""transformers' blocks with PEFT's LoRA."""

ENGINE_PATH = BlockPath(
    engine_path.block_forward,
    engine_path.recomputed_forward,
    engine_path.block_backward,
    engine_path.recomputed_backward,
    engine_path.loss_and_head,
)
"""dsft's engine."""
