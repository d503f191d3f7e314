"""Where rows come from: local files, folders of data or of source files, shipped data, the hub. One row at a time.

What the columns of a row mean is decided in `formats`.
"""

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from dsft.core.data.file_rows import READERS, read_rows
from dsft.core.data.hub_source import open_hub_source
from dsft.core.data.rows import BadRow, Row
from dsft.core.errors import DataError
from dsft.core.paths import resolve_builtin

SOURCE_FILES = "source files"
"""`Source.kind` of a folder whose files are the rows."""


class Source(Protocol):
    """A data set that can be read in order, any number of times."""

    name: str
    """What the user typed."""

    kind: str
    """"files", "source files" or "hub"."""

    left_out: Mapping[str, int]
    """Files of a folder that are no rows, counted by reason."""

    def content_key(self) -> str:
        """Return a hash of the content; the same content gives the same key wherever it lies."""

    def rows(self) -> Iterator[Row | BadRow]:
        """Read the rows in order, with little memory whatever their number."""


def open_source(name: str, *, split: str | Sequence[str], revision: str | None) -> Source:
    """Find a data set.

    Args:
        name: File, folder, `builtin:` name or hub id.
        split: Split to read where the data set has splits; of several the first that exists.
        revision: Hub branch, tag or commit.

    Raises:
        DataError: There is no such file, nothing in it can be data, or a revision is given for a local one.
        UnreachableHubError: The hub did not answer and its cache does not hold the data set.
    """
    splits = [split] if isinstance(split, str) else list(split)
    path = resolve_builtin(name) or Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for unknown users
    if revision is not None and path.exists():
        raise DataError(
            f"{name} is a local file or folder, so it has no revision {revision}.",
            "Leave out --dataset-revision, which only hub data sets have; "
            "a folder that has the name of one is given as ./owner/name.",
        )
    if path.is_dir():
        return _open_folder(path, name, splits)
    if path.exists():
        return FileSource(name, [(name, path)])
    if _looks_like_path(name):
        raise DataError(f"There is no data file {name}.", _suggest(path))
    return open_hub_source(name, splits, revision)


class FileSource:
    """The rows of one or several data files, in order.

    Args:
        name: What the user typed.
        files: Name for messages and path of each file.
        left_out: Other files, counted by reason.

    Raises:
        DataError: A file is empty or of a kind that can't be read.
    """

    kind = "files"

    def __init__(
        self, name: str, files: Sequence[tuple[str, Path]], left_out: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        for file_name, path in files:
            if path.suffix.lower() not in READERS:
                raise DataError(
                    f"{file_name} is of no known kind ({path.suffix or 'it has no suffix'}).",
                    f"Data files end in {', '.join(READERS)}; a folder of source files is given as the folder.",
                )
            if path.stat().st_size == 0:
                raise DataError(f"{file_name} is empty.", "Give a file with at least one row.")
        self.name = name
        self.left_out = left_out
        self._files = files

    def content_key(self) -> str:
        """Return a hash of the files' bytes."""
        return _hash_files((path.suffix, path) for _, path in self._files)

    def rows(self) -> Iterator[Row | BadRow]:
        """Read the rows of all files."""
        number = 0
        for file_name, path in self._files:
            for where, found in read_rows(path, file_name):
                yield BadRow(number, where, found) if isinstance(found, str) else Row(number, where, found)
                number += 1


class SourceFolder:
    """Each text file under a folder as a row with the columns `text` and `path`.

    Hidden files and folders are left out, and with them those of version control; so are files that are no UTF-8 text.

    Args:
        name: What the user typed.
        folder: The folder.

    Raises:
        DataError: There is no text file.
    """

    kind = SOURCE_FILES

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        self._paths = []
        left_out: Counter[str] = Counter()
        for path in _walk(folder):
            reason = _why_no_text(path)
            if reason is None:
                self._paths.append(path)
            else:
                left_out[reason] += 1
        self.left_out: Mapping[str, int] = left_out
        if not self._paths:
            raise DataError(f"The folder {name} holds no text file.", "Give a folder of source files, or a data file.")

    def content_key(self) -> str:
        """Return a hash of the files' paths and bytes."""
        return _hash_files((path.relative_to(self._folder).as_posix(), path) for path in self._paths)

    def rows(self) -> Iterator[Row | BadRow]:
        """Read the files in the order of their paths."""
        for number, path in enumerate(self._paths):
            where = path.relative_to(self._folder).as_posix()
            # Line ends as they are: a model is to write what the files hold.
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{self.name}/{where} changed while it was read: {error}.", "Start again.") from error
            yield Row(number, f"{self.name.rstrip('/')}/{where}", {"text": text, "path": where})


_SPLIT_WORD = re.compile(r"(?:^|[-_.])(train|training|test|eval|valid|validation|dev)(?=[-_.]|$)", re.IGNORECASE)
_SAME_SPLIT = {"training": "train", "eval": "validation", "valid": "validation", "dev": "validation"}
_BESIDE_DATA = re.compile(r"(readme|license|licence|notice|citation|dataset_infos?)(\..*)?", re.IGNORECASE)

_DOCUMENTS = frozenset(
    {"", ".txt", ".md", ".rst", ".log", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".png", ".jpg", ".jpeg", ".gif"}
    | {".svg", ".bak", ".md5", ".sha256", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst"}
)
"""Suffixes of files that also lie beside data, so that they alone make no source tree."""


def _open_folder(folder: Path, name: str, splits: Sequence[str]) -> Source:
    files = [path for path in _walk(folder) if not _BESIDE_DATA.fullmatch(path.name)]
    others = [path for path in files if path.suffix.lower() not in READERS]
    if not files or others:
        data = [path for path in files if path.suffix.lower() in READERS]
        if data and all(path.suffix.lower() in _DOCUMENTS for path in others):
            raise DataError(
                f"The folder {name} holds data files ({_name_first(data, folder)}) and other files "
                f"({_name_first(others, folder)}), so it can't be told whether it is a data set or source text.",
                "Give the data file itself, or a folder that holds only data files, or none.",
            )
        return SourceFolder(name, folder)
    left_out: Counter[str] = Counter()
    files_by_split: dict[str, list[Path]] = {}
    for path in files:
        files_by_split.setdefault(_find_split(path.relative_to(folder)), []).append(path)
    if set(files_by_split) != {""}:
        wanted = next((split for split in splits if split in files_by_split), None)
        if wanted is None:
            found = ", ".join(split or "files of no split" for split in files_by_split)
            raise DataError(f"The folder {name} has no split {splits[0]}, but {found}.", "Give one of its files.")
        left_out["of another split"] = len(files) - len(files_by_split[wanted])
        files = files_by_split[wanted]
    named = [(f"{name.rstrip('/')}/{path.relative_to(folder).as_posix()}", path) for path in files]
    return FileSource(name, named, +left_out)


def _name_first(paths: Sequence[Path], folder: Path) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0].relative_to(folder).as_posix()}{more}"


def _find_split(path: Path) -> str:
    """Return the split that a file's name tells, or one of the folders it lies in, or ""."""
    for part in (path.stem, *reversed(path.parent.parts)):
        word = _SPLIT_WORD.search(part)
        if word is not None:
            split = word.group(1).lower()
            return _SAME_SPLIT.get(split, split)
    return ""


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files under a folder that are not hidden, in the order of their paths."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in {"CVS", "__pycache__"}]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    yield from sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).parts)


def _why_no_text(path: Path) -> str | None:
    try:
        content = path.read_bytes()
        if not content.strip():
            return "empty"
        if b"\0" in content:
            return "binary"
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not in UTF-8"
    except OSError:
        return "unreadable"
    return None


def _looks_like_path(name: str) -> bool:
    has_suffix = Path(name).suffix.lower() in READERS
    return has_suffix or name.startswith((".", "/", "~", "builtin:")) or name.count("/") != 1


def _suggest(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return f"Did you mean {path.with_name(close[0])}?"
    return "Check the path given as --dataset; a hub data set has the form owner/name."


def _hash_files(files: Iterator[tuple[str, Path]]) -> str:
    total = hashlib.blake2b(digest_size=32)
    for label, path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
        total.update(f"{label}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()
