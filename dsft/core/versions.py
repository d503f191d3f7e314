"""Versions of what a run was made with; reads package metadata and loads no heavy package."""

import importlib.metadata
import platform
import sys

import dsft

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "datasets",
    "tokenizers",
    "accelerate",
    "flash-attn",
)


def versions() -> dict[str, str]:
    """Return name to version of dsft, Python, the packages that are installed, and CUDA and driver where there are."""
    found = {"dsft": dsft.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | _cuda_version() | _driver_version()


def _cuda_version() -> dict[str, str]:
    # Only a process that has loaded torch computes with it; loading it here would take seconds.
    torch = sys.modules.get("torch")
    version = torch.version.cuda if torch is not None else None
    return {} if version is None else {"cuda": str(version)}


def _driver_version() -> dict[str, str]:
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return {"driver": str(pynvml.nvmlSystemGetDriverVersion())}
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no NVIDIA driver
        return {}
