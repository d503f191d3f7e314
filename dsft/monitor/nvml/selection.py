"""Which GPUs are watched: indexes and UUIDs as a user gives them."""

from collections.abc import Sequence

from dsft.core.errors import ConfigError
from dsft.monitor.nvml.device import GpuDevice

_PREFIX = "gpu-"


def select_gpus(devices: Sequence[GpuDevice], selection: Sequence[str]) -> list[GpuDevice]:
    """Return the devices that are watched, by index.

    Args:
        devices: All there are.
        selection: Indexes, or UUIDs or unique beginnings of them, with or without `GPU-`; empty for all.

    Raises:
        ConfigError: One is not there, or a beginning fits several.
    """
    if not selection:
        return list(devices)
    chosen = {device.index for text in selection for device in [_find(devices, text.strip())]}
    return [device for device in devices if device.index in chosen]


def _find(devices: Sequence[GpuDevice], text: str) -> GpuDevice:
    for device in devices:
        if text == str(device.index):
            return device
    start = text.lower().removeprefix(_PREFIX)
    fitting = [
        device
        for device in devices
        if start and device.uuid is not None and device.uuid.lower().removeprefix(_PREFIX).startswith(start)
    ]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(f"{device.index} ({device.uuid or 'lost: it tells no UUID'})" for device in devices)
    if fitting:
        raise ConfigError(f"--gpu {text} is the beginning of several UUIDs.", f"Give more of it; there are {there}.")
    raise ConfigError(f"--gpu {text} is not there.", f"Give indexes or UUIDs; there are {there}.")
