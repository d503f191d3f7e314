"""Which device and which compute type a run takes, decided from the hardware and said aloud."""

import ctypes
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dsft.core.errors import ConfigError, NoGpuError

if TYPE_CHECKING:
    import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]
PrecisionChoice = Literal["auto", "bf16", "fp16", "fp32"]
Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Device:
    """The device a run computes on.

    Attributes:
        kind: "cuda" or "cpu".
        name: For people, e.g. "NVIDIA GeForce RTX 4090" or "CPU (2 threads)".
        capability: CUDA compute capability, e.g. (8, 9); None on a CPU.
        uuid: CUDA device UUID without prefix; None on a CPU.
        total_bytes: Memory of the device; None on a CPU.
        multiprocessors: Streaming multiprocessors; None on a CPU.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int] | None = None
    uuid: str | None = None
    total_bytes: int | None = None
    multiprocessors: int | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether the device computes in bfloat16 in hardware (NVIDIA: Ampere, compute capability 8.0, and later)."""
        return self.capability is None or self.capability >= (8, 0)


def resolve_device(choice: DeviceChoice) -> Device:
    """Return the device to use; `auto` takes the first CUDA device if there is one.

    Raises:
        NoGpuError: "cuda" was demanded and no CUDA device is usable.
    """
    import torch

    if choice != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(
            "cuda",
            properties.name,
            (properties.major, properties.minor),
            str(properties.uuid),
            properties.total_memory,
            properties.multi_processor_count,
        )
    if choice == "cuda":
        reason = (
            "this PyTorch is built without CUDA"
            if torch.version.cuda is None
            else "PyTorch finds no usable CUDA device"
        )
        raise NoGpuError(
            f"A GPU was demanded with --device cuda, but {reason}.",
            "Check nvidia-smi and the CUDA build of torch, or take --device cpu.",
        )
    return Device("cpu", f"CPU ({torch.get_num_threads()} threads)")


def choose_allocator() -> str | None:
    """Let PyTorch's allocator grow one piece of memory instead of many; it takes effect before torch is imported.

    Micro-batches differ in size, and pieces that fit one of them lie idle in the next: with samples of 300 to 4,096
    tokens 12.6 GiB instead of 15.9 were reserved for 12.3 in use. A choice of the user's own stays.

    Returns:
        A notice where that choice makes the predicted memory too low.
    """
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        chosen = os.environ.get(name)
        if chosen is not None:
            is_expandable = "expandable_segments:true" in chosen.lower()
            return None if is_expandable else f"{name} is set: without expandable_segments:True a run may need more."
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return None


def open_context() -> None:
    """Make the CUDA context now, so that what it takes can be seen."""
    import torch

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()


def read_device_memory() -> tuple[int, int]:
    """Return the free and the total bytes of the first GPU as CUDA sees them."""
    import torch

    free, total = torch.cuda.mem_get_info(0)
    return int(free), int(total)


def can_oversubscribe() -> bool:
    """Return whether managed memory may be more than the GPU has; WSL and old cards can't page it out."""
    attribute = 89  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
    value = ctypes.c_int(0)
    try:
        code = ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    except OSError:
        return False
    return code == 0 and value.value == 1


def limit_allocator(num_bytes: int) -> None:
    """Hold PyTorch's allocator to so many bytes of the first GPU."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total))


def hide_gpus() -> None:
    """Keep this process from opening a CUDA context: a CPU run needs none, and a card in use may have no room for it.

    Saving the random state, for one, would open one. It takes effect only before CUDA is first used.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def resolve_precision(choice: PrecisionChoice, device: Device) -> Precision:
    """Return the compute type: bf16 where the GPU has it, else fp16; fp32 on a CPU, where it costs nothing.

    Raises:
        ConfigError: The device can't compute in the demanded type.
    """
    if choice == "auto":
        if device.kind == "cpu":
            return "fp32"
        return "bf16" if device.has_bf16 else "fp16"
    if choice == "bf16" and not device.has_bf16:
        raise ConfigError(
            f"precision: bf16 was asked for, but {device.name} has no bfloat16.", "Take --precision fp16."
        )
    if choice == "fp16" and device.kind == "cpu":
        raise ConfigError(
            "precision: fp16 was asked for, but float16 training needs a GPU.", "Take --precision fp32 or bf16."
        )
    return choice


def torch_device(device: Device) -> "torch.device":
    """Return what torch calls a device."""
    import torch

    return torch.device("cuda", 0) if device.kind == "cuda" else torch.device("cpu")


def torch_dtype(precision: Precision) -> "torch.dtype":
    """Return the torch dtype of a compute type."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
