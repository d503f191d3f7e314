"""What an estimate has found: the presets side by side, or one configuration term by term. Bytes and seconds."""

from dataclasses import dataclass

from dsft.core.config.schema import TrainConfig
from dsft.core.memory.generation import GenerationMemory
from dsft.core.memory.model_shape import ModelShape
from dsft.core.memory.remedies import Remedy
from dsft.core.memory.training import Term
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.plans import Planned


@dataclass(frozen=True)
class PresetEstimate:
    """A preset with its plan.

    Attributes:
        name: Its name.
        config: Its settings.
        planned: Its plan.
        explanation: The plan in words.
        seed_memory_gb: What the seed document states for it; None where it states nothing.
    """

    name: str
    config: TrainConfig
    planned: Planned
    explanation: str
    seed_memory_gb: float | None


@dataclass(frozen=True)
class Comparison:
    """All presets that train on a GPU.

    Attributes:
        budget: What they are planned for.
        presets: The presets, the smallest first.
        notices: Sentences the user should read.
    """

    budget: Budget
    presets: tuple[PresetEstimate, ...]
    notices: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether all of them fit."""
        return all(preset.planned.chosen.fits for preset in self.presets)


@dataclass(frozen=True)
class HostNeeds:
    """What a run and a merge take of the host.

    Attributes:
        memory: Host memory of training; the model's file pages, which can be given back, are the last term.
        disk: Disk of a run.
        streamed_merge_bytes: Host memory of `dsft merge`, tensor by tensor and verified.
        whole_merge_bytes: Host memory of a merge of the whole model at once, as PEFT does it.
    """

    memory: tuple[Term, ...]
    disk: tuple[Term, ...]
    streamed_merge_bytes: int
    whole_merge_bytes: int


@dataclass(frozen=True)
class Breakdown:
    """One configuration, term by term.

    Attributes:
        budget: What it is planned for.
        config: The settings, with the length that was found where it was asked for.
        shape: The model.
        planned: The plan and its memory.
        explanation: The plan in words.
        remedies: What would make it fit, where it does not.
        least_budget_bytes: The smallest budget it could run in.
        generation: Memory of inference by its name.
        host: Host memory and disk.
        found_length: Whether `max_length` is the longest that fits rather than a setting.
        longest_possible: The longest the model takes, where the length was found.
        notices: Sentences the user should read.
    """

    budget: Budget
    config: TrainConfig
    shape: ModelShape
    planned: Planned
    explanation: str
    remedies: tuple[Remedy, ...]
    least_budget_bytes: int
    generation: dict[str, GenerationMemory]
    host: HostNeeds
    found_length: bool
    longest_possible: int | None
    notices: tuple[str, ...]
