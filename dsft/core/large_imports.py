"""Importing PyTorch and what builds on it: not interrupted, without garbage collections, and less of it."""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dsft.core.signals import held_signals


@contextmanager
def large_imports() -> Iterator[None]:
    """Hold signals back (see `held_signals`) and garbage collections off while large libraries are imported.

    Their 700,000 objects stay until the process ends. Looking at them again and again takes a quarter of the imports'
    time, and every later collection would look at all of them once more; so they are kept out of those as well.
    """
    with held_signals():
        if "torch" in sys.modules:
            # Little is left to import, and what is garbage by now must not be kept: a model's weights, say.
            yield
            return
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            if was_enabled:
                gc.enable()


def import_bitsandbytes() -> None:
    """Import bitsandbytes without PyTorch's compiler, whose import takes longer than its own.

    It hands its kernels for devices that have none of their own to torch.compile. On CUDA and on a CPU they serve odd
    shapes at most; with this variable torch.compile gives them back as they are.
    """
    import torch  # noqa: F401  # not under the variable

    name = "TORCHDYNAMO_DISABLE"
    chosen = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import bitsandbytes  # noqa: F401
    finally:
        if chosen is None:
            del os.environ[name]
        else:
            os.environ[name] = chosen


def wake_cuda_driver() -> None:
    """Let a thread start the CUDA driver, which takes a while and needs no PyTorch.

    No context is opened. If it fails, PyTorch meets the same error and tells it.
    """
    # Kernels are loaded when they are first called: newer drivers do so by themselves, and PyTorch asks older ones to.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    threading.Thread(target=_start_cuda_driver, name="cuda-driver").start()


def _start_cuda_driver() -> None:
    with suppress(OSError):  # there is none
        ctypes.CDLL("libcuda.so.1").cuInit(0)
