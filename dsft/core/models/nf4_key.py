"""What a quantized copy depends on: where any of it differs, another copy is made."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.core.models.device import Device
from dsft.core.models.nf4_file import LONGEST_HEADER_BYTES
from dsft.core.models.source import ModelSource, fingerprint_weights

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
"""Raised whenever the file or what is in it changes, so that older copies are not read."""

_PACKAGES = ("bitsandbytes", "torch", "transformers")


@dataclass(frozen=True)
class CopyKey:
    """The name of a copy.

    Attributes:
        series: Hash of what stays when the weights or a library change: model, device, number types. Of a series one
            copy is kept.
        content: Hash of everything the copied bytes depend on.
    """

    series: str
    content: str

    @property
    def file_name(self) -> str:
        """The copy's file in its folder."""
        return f"{self.series}-{self.content}.safetensors"


def make_copy_key(
    source: ModelSource, device: Device, dtype: "torch.dtype", quantization: Mapping[str, Any]
) -> CopyKey | None:
    """Return by what a copy is found again, or None where nothing tells whether the weights are still the same.

    Args:
        source: The model.
        device: Where it is quantized: sums over many weights are rounded in another order on another kind.
        dtype: Number type of what is not quantized, and of the weights before they are.
        quantization: How it is quantized.
    """
    weights = _describe_files(Path(source.location)) if source.is_local else source.commit
    if not weights:
        return None
    series = {
        "model": source.location,
        "device": f"{device.kind} {device.name}" if device.kind == "cuda" else device.kind,
        "dtype": str(dtype),
        "quantization": dict(quantization),
    }
    content = {
        "format": FORMAT_VERSION,
        "series": series,
        "weights": weights,
        "fingerprint": fingerprint_weights(source),
        "config": source.model_config,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    return CopyKey(_hash(series)[:16], _hash(content))


def _describe_files(folder: Path) -> list[list[Any]] | None:
    """Return what is seen of the weights without reading them, or None where they are not all safetensors."""
    if (folder / "adapter_config.json").exists():
        return None  # transformers puts that adapter on the model while it loads
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        return None
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    try:
        described: list[list[Any]] = [[path.name, _hash(path.read_text(encoding="utf-8"))] for path in indexes]
        for path in files:
            status = path.stat()
            described.append([path.name, status.st_size, status.st_mtime_ns, _hash_header(path)])
    except (OSError, ValueError):
        return None  # loading them tells what is wrong
    return described


def _hash_header(path: Path) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER_BYTES:
            raise ValueError(f"{path} has no header")
        return hashlib.sha256(file.read(length)).hexdigest()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
