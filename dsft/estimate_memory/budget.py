"""What memory an estimate plans for: a card of a size, a card by name, the GPU that is there, or an RTX 4090."""

from dataclasses import dataclass, replace
from typing import Literal

from dsft.core.memory.cards import RTX_4090, Card, card_of_device, card_of_memory, find_card
from dsft.estimate_memory.device import LocalGpu, read_gpu_zero

BudgetOrigin = Literal["vram", "gpu", "device", "default"]


@dataclass(frozen=True)
class Budget:
    """The card that is planned for.

    Attributes:
        card: The card; what other programs use of the one that is there counts as the driver's.
        origin: Who decided: --vram, --gpu, the GPU that is there, or nobody, and so an RTX 4090.
    """

    card: Card
    origin: BudgetOrigin

    @property
    def budget_bytes(self) -> int:
        """What a run can have."""
        return self.card.usable_bytes


def choose_budget(vram_gib: float | None, gpu_name: str | None) -> Budget:
    """Choose what to plan for.

    Args:
        vram_gib: Nominal size of a card in GiB.
        gpu_name: Name of a card.

    Raises:
        ConfigError: No known card is called so, or several are.
    """
    if gpu_name is not None:
        return Budget(find_card(gpu_name), "gpu")
    if vram_gib is not None:
        return Budget(card_of_memory(vram_gib), "vram")
    gpu = read_gpu_zero()
    return Budget(RTX_4090, "default") if gpu is None else Budget(_card_of(gpu), "device")


def _card_of(gpu: LocalGpu) -> Card:
    card = card_of_device(gpu.name, gpu.total_bytes, gpu.capability, gpu.multiprocessors)
    return replace(card, total_bytes=gpu.total_bytes, driver_bytes=gpu.used_bytes)
