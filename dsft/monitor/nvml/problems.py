"""NVML's errors as sentences: what was found, and what to do about it here."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.monitor.nvml.codes import DEVICE_LOST, NvmlCode
from dsft.monitor.sample import Problem

_VERSION = re.compile(r"\b\d{3,}\.\d+(?:\.\d+)?\b")
_NVIDIA = "0x10de"
_DISPLAY_CLASS = "0x03"

_IN_CONTAINER = "Start the container with the GPU: docker run --gpus all (the host needs the NVIDIA Container Toolkit)."
_IN_WSL = (
    "Install or update NVIDIA's driver in Windows, not in Linux, run `wsl --shutdown` there, and see that "
    "/usr/lib/wsl/lib is found (LD_LIBRARY_PATH)."
)
_ELSEWHERE = "Use a machine with an NVIDIA GPU, or see to its slot and power if this one has one."
_INSTALL = "Install NVIDIA's driver, restart, and see whether nvidia-smi shows the GPU."


@dataclass(frozen=True)
class Surroundings:
    """Where the monitor runs, as far as it decides what to do about a problem.

    Attributes:
        is_wsl: Whether this is Linux in Windows.
        is_container: Whether it is known to be a container.
        loaded_version: Version of the driver that the kernel runs.
        has_nvidia_card: Whether an NVIDIA GPU is on the PCI bus; None where that can't be told.
    """

    is_wsl: bool = False
    is_container: bool = False
    loaded_version: str | None = None
    has_nvidia_card: bool | None = None


def look_around(root: Path = Path("/")) -> Surroundings:
    """Find out where this is.

    Args:
        root: Of the file system.
    """
    marks = (root / ".dockerenv", root / "run/.containerenv", root / "run/systemd/container")
    loaded = _VERSION.search(_read(root / "proc/driver/nvidia/version"))
    return Surroundings(
        is_wsl="microsoft" in _read(root / "proc/sys/kernel/osrelease").lower(),
        is_container=any(mark.exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ,
        loaded_version=loaded[0] if loaded else None,
        has_nvidia_card=_has_nvidia_card(root / "sys/bus/pci/devices"),
    )


def describe_nvml_problem(nvml: Any, error: Any, around: Surroundings) -> Problem:
    """Return why NVML can't be used.

    Args:
        nvml: The pynvml module.
        error: The NVMLError.
        around: Where this is.
    """
    match error.value:
        case NvmlCode.LIBRARY_NOT_FOUND:
            return _no_library(around)
        case NvmlCode.DRIVER_NOT_LOADED:
            return _not_loaded(around)
        case NvmlCode.LIB_RM_VERSION_MISMATCH:
            return _mismatch(nvml, around)
        case NvmlCode.NO_PERMISSION:
            return Problem(
                "no_permission",
                "This user may not use the NVIDIA driver.",
                _IN_CONTAINER if around.is_container else "See who may open /dev/nvidiactl: ls -l /dev/nvidia*.",
            )
    fix = "Run nvidia-smi: if it fails too, restart the machine."
    if around.is_container:
        fix = "Restart the container: it may have lost the GPU's devices. Then see whether nvidia-smi works in it."
    return Problem("nvml_error", f"NVIDIA's driver answers with an error: {_name(error)}.", fix)


def describe_no_gpu(around: Surroundings) -> Problem:
    """Return that the driver works and has no GPU."""
    fix = "See whether nvidia-smi -L lists one, and the kernel's log: dmesg | grep -i nvrm."
    if around.is_container:
        fix = _IN_CONTAINER
    elif around.is_wsl:
        fix = _IN_WSL
    return Problem("no_gpu", "NVIDIA's driver works, but it has no GPU.", fix)


def describe_device_problem(error: Any, index: int, name: str | None, address: str | None) -> Problem:
    """Return why one GPU can't be read while NVML works.

    Args:
        error: The NVMLError.
        index: Of the GPU.
        name: Of the GPU, where it is known.
        address: Its UUID or PCI bus id: once NVML counts anew, its index may be another card's.
    """
    gpu = f"GPU {index} ({name})" if name else f"GPU {index}"
    reset = f"End what uses it, this monitor too, and reset it: nvidia-smi --gpu-reset -i {address or index}"
    if error.value == NvmlCode.RESET_REQUIRED:
        return Problem("gpu_lost", f"{gpu} has to be reset.", f"{reset}, or restart the machine.")
    if error.value in DEVICE_LOST or error.value == NvmlCode.UNKNOWN:
        return Problem(
            "gpu_lost",
            f"{gpu} is lost: {_name(error)}.",
            f"See dmesg for its Xid error. {reset}. If that fails, restart the machine; if it comes back, see to its "
            "power and its slot.",
        )
    if error.value == NvmlCode.NO_PERMISSION:
        return Problem("no_permission", f"This user may not use {gpu}.", "See who may open it: ls -l /dev/nvidia*.")
    if error.value == NvmlCode.INSUFFICIENT_POWER:
        return Problem("nvml_error", f"{gpu} has no external power.", "Connect its power cables.")
    return Problem("nvml_error", f"{gpu} answers with an error: {_name(error)}.", "See dmesg for messages of NVRM.")


def _no_library(around: Surroundings) -> Problem:
    found = "There is no NVIDIA driver here: its library libnvidia-ml.so.1 is not found."
    if around.is_wsl:
        fix = _IN_WSL
    elif around.has_nvidia_card is False:
        found = "There is no NVIDIA GPU on this machine's PCI bus, and no driver for one."
        fix = _ELSEWHERE
    elif around.is_container:
        fix = _IN_CONTAINER
    elif around.loaded_version is not None:
        found = f"Driver {around.loaded_version} is loaded, but its library libnvidia-ml.so.1 is not found."
        fix = "Install the driver's libraries of that version, or give their folder in LD_LIBRARY_PATH."
    else:
        fix = _INSTALL
    return Problem("no_driver", found, fix)


def _not_loaded(around: Surroundings) -> Problem:
    found = "NVIDIA's driver is installed, but not loaded."
    if around.is_wsl:
        fix = _IN_WSL
    elif around.has_nvidia_card is False:
        found = "NVIDIA's driver is installed, but not loaded: there is no NVIDIA GPU on this machine's PCI bus."
        fix = _ELSEWHERE
    elif around.is_container:
        fix = _IN_CONTAINER
    else:
        fix = (
            "Load it: sudo modprobe nvidia. If that fails, dmesg says why; after an update of the kernel, reinstall it."
        )
    return Problem("driver_not_loaded", found, fix)


def _mismatch(nvml: Any, around: Surroundings) -> Problem:
    library, loaded = _library_version(nvml), around.loaded_version
    versions = " and ".join(
        text
        for text in (
            f"the library is {library}" if library else "",
            f"the kernel runs {loaded}" if loaded else "",
        )
        if text
    )
    found = "NVIDIA's driver was updated while the old one is still running"
    fix = "Restart the machine."
    if around.is_container:
        found = "The container's NVIDIA libraries are of another version than the host's driver"
        fix = "Start the container anew, so that it gets the host's libraries; take none of its own into the image."
    return Problem("version_mismatch", f"{found}{f': {versions}' if versions else ''}.", fix)


def _library_version(nvml: Any) -> str | None:
    try:
        version = nvml.nvmlSystemGetNVMLVersion()  # e.g. 13.580.159.04: CUDA's version, then the driver's
    except nvml.NVMLError:
        return None
    found = _VERSION.search(version.decode() if isinstance(version, bytes) else str(version))
    return found[0] if found else None


def _name(error: Any) -> str:
    return f"{error} (NVML code {error.value})"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _has_nvidia_card(devices: Path) -> bool | None:
    try:
        folders = list(devices.iterdir())
    except OSError:
        return None
    if not folders:
        return None
    return any(
        _read(folder / "vendor").strip() == _NVIDIA and _read(folder / "class").startswith(_DISPLAY_CLASS)
        for folder in folders
    )
