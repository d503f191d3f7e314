"""Tokenized samples on disk: written once beside their place, then read memory-mapped; damaged ones are made anew."""

import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dsft.core.data.samples import Sample
from dsft.core.data.tokenize import SampleBatch
from dsft.core.errors import DataError

FORMAT_VERSION = 3
"""Raised whenever the files or the making of samples change, so that older caches are not read."""

INDEX = "index"
STALE_S = 24 * 3600.0
_CHUNK_BYTES = 1 << 20


class TokenStore:
    """The samples of a folder, read from memory-mapped files; see `TokenizedDataset`.

    It is small to copy into other processes: they map the same files.

    Args:
        folder: What `StoreWriter` wrote.
        is_checked: Whether the files were already compared with their digests.

    Raises:
        ValueError: The folder is incomplete or damaged.
    """

    def __init__(self, folder: Path, is_checked: bool = False) -> None:
        self.folder = folder
        try:
            index = _read_index(folder / INDEX)
            self.report: dict[str, Any] = index["report"]
            self._files = {
                name: np.memmap(folder / name, dtype=np.dtype(file["dtype"]), mode="r")
                if file["bytes"]
                else np.empty(0, dtype=np.dtype(file["dtype"]))
                for name, file in index["files"].items()
            }
            is_whole = is_checked or all(
                _digest(folder / name) == file["digest"] for name, file in index["files"].items()
            )
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} is incomplete: {error}") from error
        if not is_whole:
            raise ValueError(f"{folder} is damaged")
        self.lengths: npt.NDArray[np.int64] = np.array(self._files["lengths"])
        self._ends: npt.NDArray[np.int64] = np.cumsum(self.lengths)

    @property
    def prompts(self) -> npt.NDArray[np.uint64]:
        """Prompt hash of each sample, uint64, shape [num_samples]."""
        return self._files["prompts"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        end = int(self._ends[index])
        span = slice(end - int(self.lengths[index]), end)
        return Sample(
            token_ids=self._files["token_ids"][span].astype(np.int64),
            is_target=self._files["is_target"][span].astype(np.bool_),
            row=int(self._files["rows"][index]),
        )

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path, bool]]:
        # Pickling a memory map would copy the file.
        return TokenStore, (self.folder, True)


class StoreWriter:
    """Writes samples into a folder, batch by batch, with little memory.

    Args:
        folder: An empty folder.
        vocabulary_size: One more than the largest token id.
        files: Closes the files.
    """

    def __init__(self, folder: Path, vocabulary_size: int, files: ExitStack) -> None:
        self._folder = folder
        self._types = {
            "token_ids": np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32),
            "is_target": np.dtype(np.bool_),
            "lengths": np.dtype(np.int64),
            "rows": np.dtype(np.int64),
            "prompts": np.dtype(np.uint64),
        }
        self._files: dict[str, BinaryIO] = {
            name: files.enter_context((folder / name).open("wb")) for name in self._types
        }

    def add(self, batch: SampleBatch) -> npt.NDArray[np.int64]:
        """Write a batch of samples and return how many tokens of each carry loss, int64, shape [num_samples]."""
        bounds = np.concatenate([[0], np.cumsum(batch.lengths)])
        targets_before = np.concatenate([[0], np.cumsum(batch.is_target)])
        target_counts: npt.NDArray[np.int64] = np.diff(targets_before[bounds])
        arrays = {
            "token_ids": batch.token_ids,
            "is_target": batch.is_target,
            "lengths": batch.lengths,
            "rows": batch.rows,
            "prompts": batch.prompts,
        }
        for name, array in arrays.items():
            self._files[name].write(array.astype(self._types[name], copy=False).tobytes())
        return target_counts

    def finish(self, report: dict[str, object]) -> None:
        """Write the index, without which the folder is no store."""
        files = {}
        for name, dtype in self._types.items():
            self._files[name].close()
            path = self._folder / name
            files[name] = {"dtype": dtype.str, "bytes": path.stat().st_size, "digest": _digest(path)}
        content = json.dumps({"report": report, "files": files}, ensure_ascii=False)
        (self._folder / INDEX).write_text(f"{_digest_text(content)}\n{content}", encoding="utf-8")


def open_or_build(
    cache: Path, key: str, vocabulary_size: int, build: Callable[[StoreWriter], dict[str, object]]
) -> tuple[TokenStore, bool]:
    """Open the store of a key, or make it if there is none or it is damaged.

    Args:
        cache: dsft's cache folder.
        key: Hash of everything the samples depend on.
        vocabulary_size: One more than the largest token id.
        build: Writes all samples and returns the report to keep with them.

    Returns:
        The store, and whether it was there already.

    Raises:
        DataError: The cache folder can't be written; or what `build` raises, in which case nothing is left behind.
    """
    folder = cache / "tokens" / key
    try:
        return TokenStore(folder), True
    except ValueError:
        pass
    with _staging(folder) as staging:
        with ExitStack() as files:
            writer = StoreWriter(staging, vocabulary_size, files)
            writer.finish(build(writer))
        return _put(staging, folder), False


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Give a new folder beside a place in the cache, and remove it unless it was moved."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob("*.partial"):
            # Another process may be done with it by now.
            with suppress(FileNotFoundError):
                if time.time() - stale.stat().st_mtime > STALE_S:
                    shutil.rmtree(stale, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield staging
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, folder: Path) -> TokenStore:
    """Move a new store to its place; of two that were made at once the first stays, since it may be in use."""
    store = TokenStore(staging)
    while True:
        try:
            staging.rename(folder)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
        else:
            store.folder = folder
            return store
        with suppress(ValueError):
            return TokenStore(folder)
        damaged = staging.with_suffix(".old.partial")
        with suppress(FileNotFoundError):
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"The token cache {folder.parent} can't be written: {error.strerror or error}.",
        "Make room there, or set XDG_CACHE_HOME to another folder.",
    )


def _read_index(path: Path) -> dict[str, Any]:
    digest, _, content = path.read_text(encoding="utf-8").partition("\n")
    if digest != _digest_text(content):
        raise ValueError(f"{path} is damaged")
    index: dict[str, Any] = json.loads(content)
    return index


def _digest_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
