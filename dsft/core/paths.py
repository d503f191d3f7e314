"""Where dsft writes outside a run's folders, and where its own shipped files are."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return dsft's cache folder, `$XDG_CACHE_HOME/dsft`; its content is safe to delete."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def nf4_cache_dir() -> Path:
    """Return the folder of quantized copies of models."""
    return cache_dir() / "nf4"


def triton_cache_dir() -> Path:
    """Return the folder of what Triton compiles."""
    return cache_dir() / "triton"


def state_dir() -> Path:
    """Return dsft's state folder, `$XDG_STATE_HOME/dsft`: what goes on now, and nothing that a later run needs."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def live_runs_dir() -> Path:
    """Return the folder in which every training run leaves a file as long as it goes on."""
    return state_dir() / "runs"


def presets_dir() -> Path:
    """Return the folder of presets: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "presets"


def resolve_builtin(name: str) -> Path | None:
    """Return the shipped file or folder that a `builtin:` name stands for, or None for any other name.

    `builtin:tiny/model` is the folder `presets/tiny/model`. A path that leaves the presets is no builtin name.
    """
    prefix = "builtin:"
    if not name.startswith(prefix):
        return None
    root = presets_dir().resolve()
    path = (root / name.removeprefix(prefix)).resolve()
    return path if path.is_relative_to(root) else None


def _xdg(variable: str, default_under_home: str) -> Path:
    value = os.environ.get(variable)
    # The XDG specification has relative values ignored.
    base = Path(value) if value and Path(value).is_absolute() else Path.home() / default_under_home
    return base / "dsft"
