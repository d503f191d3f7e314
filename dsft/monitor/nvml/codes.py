"""What NVML's error codes mean for a reader: one counter, one GPU, or everything."""

from enum import IntEnum


class NvmlCode(IntEnum):
    """The codes that are told apart here (nvmlReturn_t of NVML's API)."""

    UNINITIALIZED = 1
    INVALID_ARGUMENT = 2
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
    INSUFFICIENT_POWER = 8
    DRIVER_NOT_LOADED = 9
    IRQ_ISSUE = 11
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    ARGUMENT_VERSION_MISMATCH = 25
    DEPRECATED = 26
    GPU_NOT_FOUND = 28
    UNKNOWN = 999


UNANSWERABLE = frozenset(
    {
        NvmlCode.INVALID_ARGUMENT,
        NvmlCode.NOT_SUPPORTED,
        NvmlCode.NO_PERMISSION,
        NvmlCode.FUNCTION_NOT_FOUND,
        NvmlCode.ARGUMENT_VERSION_MISMATCH,
        NvmlCode.DEPRECATED,
    }
)
"""Of a counter: it will not be told, however often it is asked for."""

DEVICE_LOST = frozenset({NvmlCode.GPU_IS_LOST, NvmlCode.RESET_REQUIRED, NvmlCode.GPU_NOT_FOUND})
"""Whatever was asked: the GPU itself is not there."""

NVML_LOST = frozenset(
    {
        NvmlCode.UNINITIALIZED,
        NvmlCode.DRIVER_NOT_LOADED,
        NvmlCode.LIBRARY_NOT_FOUND,
        NvmlCode.LIB_RM_VERSION_MISMATCH,
    }
)
"""Whatever was asked: no GPU can be read."""
