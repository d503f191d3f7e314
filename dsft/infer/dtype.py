"""Which number type generation takes, decided from the hardware."""

from typing import Literal

from dsft.core.errors import ConfigError
from dsft.core.models.device import Device

DtypeChoice = Literal["auto", "bfloat16", "float16", "float32"]
DtypeName = Literal["bfloat16", "float16", "float32"]


def resolve_dtype(choice: DtypeChoice, device: Device) -> DtypeName:
    """Return the type of weights and arithmetic: on a GPU bfloat16 where it has it, else float16; float32 on a CPU.

    Raises:
        ConfigError: The GPU has no arithmetic of the demanded type.
    """
    if choice == "auto":
        if device.kind == "cpu":
            return "float32"
        return "bfloat16" if device.has_bf16 else "float16"
    if choice == "bfloat16" and not device.has_bf16:
        raise ConfigError(
            f"--dtype bfloat16 was given, but {device.name} has no bfloat16 arithmetic.", "Take --dtype float16."
        )
    return choice
