"""Reading safetensors files tensor by tensor, or by rows; nothing is mapped, so what is not held takes no memory."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING

from dsft.core.errors import ModelError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of number types in safetensors that a checkpoint of 16 bits or more may hold, as torch calls them."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes are.

    Attributes:
        path: The file.
        dtype: Number type, as safetensors names it.
        shape: Its shape.
        first_byte: Where its bytes begin in the file.
        num_bytes: How many there are.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    first_byte: int
    num_bytes: int

    @property
    def torch_dtype(self) -> "torch.dtype":
        """Its number type in torch.

        Raises:
            ModelError: A type that only quantized checkpoints hold.
        """
        import torch

        if self.dtype not in _DTYPES:
            raise ModelError(
                f"{self.path} holds numbers of the type {self.dtype}, so its weights are quantized.",
                "Give the model with its 16-bit weights.",
            )
        dtype: torch.dtype = getattr(torch, _DTYPES[self.dtype])
        return dtype


class WeightFiles:
    """The tensors of one or several safetensors files.

    Args:
        tensors: By name, in the order of the files.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = MappingProxyType(dict(tensors))
        self._descriptors: dict[Path, int] = {}
        self._opening = Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> "torch.dtype":
        """Return the number type of a tensor."""
        return self.tensors[name].torch_dtype

    def read(self, name: str) -> "torch.Tensor":
        """Return a tensor as it is stored, in memory of its own."""
        stored = self.tensors[name]
        return self._read_bytes(stored, 0, stored.num_bytes).view(stored.torch_dtype).view(stored.shape)

    def read_rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        """Return the rows (first dimension) from `first` up to but not including `last`, in memory of their own."""
        stored = self.tensors[name]
        row_bytes = stored.num_bytes // max(1, stored.shape[0])
        rows = self._read_bytes(stored, first * row_bytes, (last - first) * row_bytes)
        return rows.view(stored.torch_dtype).view(last - first, *stored.shape[1:])

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_bytes(self, stored: StoredTensor, offset: int, num_bytes: int) -> "torch.Tensor":
        import torch

        with self._opening:  # several threads may read
            if stored.path not in self._descriptors:
                self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors[stored.path]
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
        done = 0
        while done < num_bytes:
            # One system call reads at most 2 GiB.
            count = os.preadv(descriptor, [view[done:]], stored.first_byte + offset + done)
            if count == 0:
                raise ModelError(f"{stored.path} has become shorter while it was read.", "Copy the model again.")
            done += count
        return buffer


def open_model_weights(folder: Path, name: str) -> WeightFiles:
    """Open the weights of a model folder: one file, or several with an index.

    Args:
        folder: The folder.
        name: What messages call the model.

    Raises:
        ModelError: There are no safetensors, a file is missing or damaged, or the index leads out of the folder.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return WeightFiles(_read_indexed(index))
    if (folder / SINGLE_FILE).is_file():
        return open_weight_file(folder / SINGLE_FILE)
    raise ModelError(
        f"{name} has no {SINGLE_FILE} and no {INDEX_FILE}, so there are no weights to read.",
        "Give a model with safetensors weights; transformers' save_pretrained writes them.",
    )


def list_weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold a model's weights, whether they are there or not.

    Args:
        folder: Holds the index, if the model has one.

    Raises:
        ModelError: The index is damaged or leads out of the folder.
    """
    index = folder / INDEX_FILE
    return sorted(set(_read_index(index).values())) if index.is_file() else [SINGLE_FILE]


def open_weight_file(path: Path) -> WeightFiles:
    """Open one safetensors file.

    Raises:
        ModelError: It is damaged.
    """
    return WeightFiles(dict(_read_header(path)))


def _read_index(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} can't be read: {error!r}.", "Copy the model again.") from None
    for file in names.values():
        if Path(file).name != file or file in {".", ".."}:
            raise ModelError(
                f"{index} names the file {file}, which is outside its folder.",
                "Take the model from a source you trust.",
            )
    return names


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    names = _read_index(index)
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(names.values())):
        if not (index.parent / file).is_file():
            raise ModelError(f"{index} names the file {file}, which is missing.", "Copy the model again.")
        found.update(_read_header(index.parent / file))
    missing = sorted(names.keys() - found.keys())
    if missing:
        raise ModelError(f"{index} names {missing[0]}, which is in none of its files.", "Copy the model again.")
    # A file may hold more than the index says; the index decides.
    return {tensor: found[tensor] for tensor in found if tensor in names}


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass  # the library's own checks of header, offsets and size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}.", "Copy it again from where it was saved.") from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        first, last = entry["data_offsets"]
        yield name, StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + first, last - first)
