"""Silence what other libraries log and warn, so that dsft's own lines stand alone; DSFT_DEBUG=1 lets all through."""

import logging
import os
import sys
import warnings

_QUIET_ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Read by the libraries when they are imported; a value the user has set stays."""

_LOGGERS = ("accelerate", "bitsandbytes", "datasets", "filelock", "huggingface_hub", "matplotlib", "peft", "pynvml",
            "torch", "transformers", "trl")  # fmt: skip


def is_debugging() -> bool:
    """Return whether the user asked for tracebacks and the libraries' own messages."""
    return os.environ.get("DSFT_DEBUG", "") not in ("", "0")


def silence_libraries() -> None:
    """Keep other libraries from writing below the level of errors; call it before they are imported."""
    if is_debugging():
        return
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for logger in _LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
