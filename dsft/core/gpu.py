"""What NVML says about a GPU, in bytes; no torch, no drawing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one device as the driver sees it: every process, contexts included.

    Attributes:
        used_bytes: In use by all processes.
        total_bytes: What the card has.
    """

    used_bytes: int
    total_bytes: int

    @property
    def free_bytes(self) -> int:
        """What no process has."""
        return self.total_bytes - self.used_bytes


class GpuMemoryReader:
    """Reads the memory of one GPU through NVML.

    Args:
        uuid: The device's UUID, with or without the prefix "GPU-"; indexes differ between CUDA and NVML as soon as
            CUDA_VISIBLE_DEVICES is set.
    """

    def __init__(self, uuid: str) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")

    def read(self) -> GpuMemory:
        """Return the memory in use and the total now."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return GpuMemory(int(memory.used), int(memory.total))


def open_gpu_memory(uuid: str) -> GpuMemoryReader | None:
    """Return a reader for the device, or None where NVML does not answer for it (no driver, some containers)."""
    import pynvml

    try:
        reader = GpuMemoryReader(uuid)
        reader.read()
    except pynvml.NVMLError:
        return None
    return reader
