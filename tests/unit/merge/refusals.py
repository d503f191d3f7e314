"""Spoiling an adapter or its base, and asserting that `dsft merge` then refuses it and writes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsft.core.errors import DsftError, ModelError
from dsft.merge.config import MergeConfig
from dsft.merge.result import MergeResult
from dsft.merge.run import run_merge

Change = Callable[[dict[str, Tensor]], object]


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(path: Path, change: Change) -> None:
    """Change the tensors of a safetensors file."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def put(name: str, number: float) -> Change:
    """Return a change of the last number of a tensor."""

    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[-1] = number

    return change


def record_run(adapter: Path, base_name: str, *, fingerprint: str | None = None, precision: str | None = None) -> None:
    """Write what `dsft train` records of a run's base model."""
    model = {"name": base_name, "revision": None, "fingerprint": fingerprint, "precision": precision}
    summary = {"template": "instruction", "model": model}
    (adapter / "training_summary.json").write_text(json.dumps(summary))


def merge(adapter: Path, **settings: Any) -> MergeResult:
    """Merge without verification."""
    return run_merge(MergeConfig(str(adapter), **({"is_verifying": False} | settings)), lambda event: None)


def look(folder: Path) -> dict[str, tuple[int, int]]:
    """Return everything in a folder with its size and time: a file made and removed again would change its folder's."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def refused(adapter: Path, words: str, kind: type[DsftError] = ModelError, **settings: Any) -> DsftError:
    """Assert that a merge is refused with these words, says what to do, and leaves the folder around untouched.

    Returns:
        What it is refused with.
    """
    before = look(adapter.parent)
    with pytest.raises(kind, match=words) as caught:
        merge(adapter, **settings)
    assert type(caught.value) is kind
    assert caught.value.fix
    assert look(adapter.parent) == before
    return caught.value
