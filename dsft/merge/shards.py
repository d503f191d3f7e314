"""Writing safetensors as a stream: the header from names and shapes, then one piece of a tensor after another."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dsft.core.models.weight_files import INDEX_FILE, SINGLE_FILE
from dsft.merge.config import OutputDtype
from dsft.merge.weights import MergedTensor

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5 * 10**9

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number."""


@dataclass(frozen=True)
class Shard:
    """One weight file.

    Attributes:
        file: Its name.
        tensors: Its tensors, in the order they are written.
    """

    file: str
    tensors: tuple[MergedTensor, ...]


@dataclass(frozen=True)
class ShardLayout:
    """How tensors are divided into files.

    Attributes:
        shards: The files.
        dtype: Type of all tensors.
    """

    shards: tuple[Shard, ...]
    dtype: OutputDtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensor_bytes(tensor) for shard in self.shards for tensor in shard.tensors)

    def tensor_bytes(self, tensor: MergedTensor) -> int:
        """Return the bytes of one tensor."""
        return prod(tensor.shape) * VALUE_BYTES[self.dtype]

    def write_index(self, folder: Path) -> None:
        """Write which file holds which tensor, where there are several files."""
        if len(self.shards) == 1:
            return
        num_parameters = sum(prod(tensor.shape) for shard in self.shards for tensor in shard.tensors)
        index = {
            "metadata": {"total_parameters": num_parameters, "total_size": self.num_bytes},
            "weight_map": {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors},
        }
        (folder / INDEX_FILE).write_text(f"{json.dumps(index, indent=2)}\n", encoding="utf-8")


def lay_out(tensors: Sequence[MergedTensor], dtype: OutputDtype, max_bytes: int = MAX_SHARD_BYTES) -> ShardLayout:
    """Divide tensors into files of at most `max_bytes`; a tensor that is larger alone gets a file of its own."""
    groups: list[list[MergedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        num_bytes = prod(tensor.shape) * VALUE_BYTES[dtype]
        if groups[-1] and filled + num_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += num_bytes
    if len(groups) == 1:
        return ShardLayout((Shard(SINGLE_FILE, tuple(groups[0])),), dtype)
    names = (f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1))
    return ShardLayout(tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)), dtype)


def write_shard(folder: Path, shard: Shard, layout: ShardLayout, pieces: "Iterator[torch.Tensor]") -> Iterator[int]:
    """Write one file.

    Args:
        folder: Where it goes.
        shard: The file and its tensors.
        layout: The layout it belongs to.
        pieces: The tensors' numbers in the layout's type, on the CPU, in the order of the shard.

    Yields:
        The bytes of each piece once it is written.
    """
    with (folder / shard.file).open("wb") as file:
        _write_header(file, shard, layout)
        written = 0
        for piece in pieces:
            file.write(_as_bytes(piece))
            written += piece.nbytes
            yield piece.nbytes
    expected = sum(layout.tensor_bytes(tensor) for tensor in shard.tensors)
    if written != expected:
        raise ValueError(f"{shard.file} got {written} bytes, and its header says {expected}")


def _write_header(file: BinaryIO, shard: Shard, layout: ShardLayout) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    first = 0
    for tensor in shard.tensors:
        last = first + layout.tensor_bytes(tensor)
        header[tensor.name] = {
            "dtype": _NAMES[layout.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, last],
        }
        first = last
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def _as_bytes(piece: "torch.Tensor") -> memoryview:
    import torch

    return piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
