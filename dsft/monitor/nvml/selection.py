"""Which GPUs are watched: indexes and UUIDs as a user gives them."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsft.core.errors import ConfigError
from dsft.monitor.nvml.device import GpuDevice

_GPU, _PART = "gpu-", "mig-"


@dataclass(frozen=True)
class _Choice:
    """A GPU as a whole, or one MIG instance of it."""

    device: GpuDevice
    uuid: str | None
    is_part: bool = False


def select_gpus(devices: Sequence[GpuDevice], selection: Sequence[str]) -> list[GpuDevice]:
    """Return the devices that are watched, by index; one of which MIG instances were chosen tells these alone.

    Args:
        devices: All there are.
        selection: Indexes, or UUIDs or unique beginnings of them, with or without `GPU-`, those of MIG instances with
            `MIG-`; empty for all.

    Raises:
        ConfigError: One is not there, or a beginning fits several.
        NVMLError: NVML as a whole is lost.
    """
    if not selection:
        return list(devices)
    chosen = [_find(devices, text.strip()) for text in selection]
    for device in devices:
        choices = [choice for choice in chosen if choice.device is device]
        if choices and all(choice.is_part for choice in choices):
            device.watch_parts(frozenset(choice.uuid for choice in choices if choice.uuid is not None))
    return [device for device in devices if any(choice.device is device for choice in chosen)]


def _find(devices: Sequence[GpuDevice], text: str) -> _Choice:
    for device in devices:
        if text == str(device.index):
            return _Choice(device, device.uuid)
    start = text.lower()
    is_part = start.startswith(_PART)
    gpus = [_Choice(device, device.uuid) for device in devices]
    parts = [_Choice(device, uuid, is_part=True) for device in devices for uuid in device.find_parts()]
    prefix = _PART if is_part else _GPU
    start = start.removeprefix(prefix)
    fitting = [
        choice
        for choice in (parts if is_part else gpus)
        if start and choice.uuid is not None and choice.uuid.lower().removeprefix(prefix).startswith(start)
    ]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(
        f"{choice.device.index} ({choice.uuid or 'lost: it tells no UUID'})" for choice in [*gpus, *parts]
    )
    if fitting:
        raise ConfigError(f"--gpu {text} is the beginning of several UUIDs.", f"Give more of it; there are {there}.")
    raise ConfigError(f"--gpu {text} is not there.", f"Give indexes or UUIDs; there are {there}.")
