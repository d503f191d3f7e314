"""The file of a quantized copy: safetensors, written and read by several threads, every byte under a checksum."""

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsft.core.signals import held_signals

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "F64": "float64",
    "I64": "int64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of number types in safetensors, and torch's."""

_PIECE_BYTES = 8 * 2**20
_MOST_THREADS = 8
_ALIGNMENT = 64
_NO_CHECKSUM = "00000000"
LONGEST_HEADER_BYTES = 100 * 10**6
"""What the safetensors library reads, too."""


class DamagedCopyError(Exception):
    """A copy is not what was written, or not of the model that it was taken for."""


@dataclass(frozen=True)
class _Piece:
    # A part of a tensor as flat bytes on its device, and where it lies in the file.
    content: "torch.Tensor"
    first_byte: int


class CopyFile:
    """A copy that is open for reading; its header is checked, its tensors are while they are read.

    Args:
        descriptor: The open file; the caller closes it.

    Attributes:
        layouts: Number type and shape of each tensor, by name.
        notes: What was written beside the tensors.

    Raises:
        DamagedCopyError: Header or size are not what was written.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        try:
            header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if header_bytes > LONGEST_HEADER_BYTES:
                raise DamagedCopyError("its header has no end")
            header = json.loads(os.pread(descriptor, header_bytes, 8))
            checksum = header["__metadata__"]["header"]
            header["__metadata__"]["header"] = _NO_CHECKSUM
            if checksum != _checksum(_encode(header)):
                raise DamagedCopyError("its header was changed")
            notes = header.pop("__metadata__")
            self._first_byte = 8 + header_bytes
            self._offsets: dict[str, int] = {name: entry["data_offsets"][0] for name, entry in header.items()}
            self._checksums: str = notes["pieces"]
            self.notes: dict[str, Any] = json.loads(notes["notes"])
            self.layouts = {
                name: (_torch_dtype(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()
            }
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCopyError(f"its header can't be read: {error}") from error
        if os.fstat(descriptor).st_size != self._first_byte + end:
            raise DamagedCopyError("it is cut short")

    def read_into(self, tensors: "Mapping[str, torch.Tensor]") -> None:
        """Fill tensors of the copy's layouts, wherever they are.

        Raises:
            DamagedCopyError: The content is not what was written.
        """
        pieces = list(_cut(tensors, self._offsets, self._first_byte))
        try:
            checksums = _move(pieces, lambda piece, buffer: _read(self._descriptor, piece, buffer))
        except OSError as error:
            raise DamagedCopyError(f"it can't be read: {error.strerror}") from error
        if "".join(checksums) != self._checksums:
            raise DamagedCopyError("its content was changed")


def count_copy_bytes(tensors: "Mapping[str, torch.Tensor]") -> int:
    """Return how many bytes the tensors of a copy take; the header is small beside them."""
    return sum(tensor.nbytes for tensor in tensors.values())


def is_storable(tensor: "torch.Tensor") -> bool:
    """Return whether a copy can hold a tensor: its number type has a name there."""
    return _name_dtype(tensor) in _DTYPES.values()


def write_copy(descriptor: int, tensors: "Mapping[str, torch.Tensor]", notes: Mapping[str, Any]) -> None:
    """Write tensors, wherever they are, into an empty file.

    Args:
        descriptor: The file, open for writing.
        tensors: By name; `is_storable` says which can be.
        notes: What else to keep; JSON.

    Raises:
        OSError: The file can't be written.
    """
    names = {torch_name: name for name, torch_name in _DTYPES.items()}
    # The widest numbers come first, so that each tensor is aligned to its own.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, Any] = {"__metadata__": {"header": _NO_CHECKSUM, "pieces": "", "notes": json.dumps(notes)}}
    offset = 0
    for name, tensor in ordered.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[_name_dtype(tensor)], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    offsets = {name: header[name]["data_offsets"][0] for name in ordered}
    # Checksums have a length of their own, so the header's is known before they are.
    header["__metadata__"]["pieces"] = _NO_CHECKSUM * sum(1 for _ in _cut(ordered, offsets, 0))
    first_byte = 8 + len(_pad(_encode(header)))
    pieces = list(_cut(ordered, offsets, first_byte))
    header["__metadata__"]["pieces"] = "".join(_move(pieces, lambda piece, buffer: _write(descriptor, piece, buffer)))
    header["__metadata__"]["header"] = _checksum(_encode(header))
    encoded = _pad(_encode(header))
    _write_whole(descriptor, memoryview(len(encoded).to_bytes(8, "little") + encoded), 0)


def _cut(tensors: "Mapping[str, torch.Tensor]", offsets: Mapping[str, int], first_byte: int) -> Iterator[_Piece]:
    import torch

    for name in offsets:
        content = tensors[name].detach().reshape(-1).view(torch.uint8)
        for start in range(0, len(content), _PIECE_BYTES):
            yield _Piece(content[start : start + _PIECE_BYTES], first_byte + offsets[name] + start)


def _move(pieces: list[_Piece], move: "Callable[[_Piece, torch.Tensor], str]") -> list[str]:
    """Move pieces between file and device in threads, and return their checksums."""
    import torch

    own = threading.local()

    def run(piece: _Piece) -> str:
        if piece.content.device.type == "cpu":
            return move(piece, piece.content)
        if not hasattr(own, "buffer"):
            # Copies from and to pinned memory are several times as fast.
            own.buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        return move(piece, own.buffer[: len(piece.content)])

    num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads, "nf4") as pool:
        with held_signals():  # an exception while threads start would leave them waiting
            futures = [pool.submit(run, piece) for piece in pieces]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _read(descriptor: int, piece: _Piece, buffer: "torch.Tensor") -> str:
    view = buffer.numpy().data
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], piece.first_byte + done)
        if count == 0:
            raise DamagedCopyError("it has become shorter while it was read")
        done += count
    checksum = _checksum(view)
    if buffer is not piece.content:
        piece.content.copy_(buffer)
    return checksum


def _write(descriptor: int, piece: _Piece, buffer: "torch.Tensor") -> str:
    if buffer is not piece.content:
        buffer.copy_(piece.content)
    view = buffer.numpy().data
    _write_whole(descriptor, view, piece.first_byte)
    return _checksum(view)


def _write_whole(descriptor: int, content: memoryview, first_byte: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], first_byte + done)


def _checksum(content: bytes | memoryview) -> str:
    return f"{zlib.crc32(content):08x}"


def _encode(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode("ascii")


def _pad(header: bytes) -> bytes:
    return header + b" " * (-(8 + len(header)) % _ALIGNMENT)


def _name_dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _torch_dtype(name: str) -> "torch.dtype":
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype
