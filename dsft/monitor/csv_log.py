"""`dsft monitor --csv`: a row for each GPU and sample, values as in the JSON objects; lists become counts or words."""

import csv
import io
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Self

from dsft.core.errors import ConfigError, WriteError, describe_os_error
from dsft.monitor.sample import GpuSample, HostSample, Sample

_GPU_COLUMNS = tuple(field.name for field in fields(GpuSample) if field.name not in {"problem", "migs", "processes"})
_HOST_COLUMNS = tuple(field.name for field in fields(HostSample))

COLUMNS = (
    "time",
    *(name if name.startswith("gpu_") else f"gpu_{name}" for name in _GPU_COLUMNS),
    "gpu_num_processes",
    "gpu_problem",
    *(f"host_{name}" for name in _HOST_COLUMNS),
)
"""What is not told is an empty cell. Without a usable GPU a row has the host's values alone."""

HEADER_ROW = ",".join(COLUMNS) + "\n"
_HEADER = HEADER_ROW.rstrip().encode()


def format_rows(sample: Sample) -> str:
    """Return a sample as rows, one for each GPU, each with its end."""
    host = [_cell(getattr(sample.host, name, None)) for name in _HOST_COLUMNS]
    rows = [[sample.time, *_gpu_cells(gpu), *host] for gpu in sample.gpus]
    if not rows:
        problem = sample.problem.kind if sample.problem is not None else ""
        rows = [[sample.time, *[""] * (len(_GPU_COLUMNS) + 1), problem, *host]]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    # A folder's name need not be text.
    return text.getvalue().encode(errors="backslashreplace").decode()


class CsvLog:
    """Appends samples to a file; `with CsvLog(path) as log: log.write(sample)`.

    Args:
        path: A new file, or one with the same columns, which is gone on with.

    Raises:
        ConfigError: The file holds something else, or can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            first_line, is_cut_short = _look_at(path)
            if first_line and first_line.rstrip(b"\r\n") != _HEADER:
                raise ConfigError(f"--csv {path} holds something else than rows of this version.", "Name another file.")
            # Unbuffered: a row that could not be written is not tried again when the file is closed.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            reason = describe_os_error(error)
            raise ConfigError(f"--csv {path} can't be written: {reason}.", "Name another file.") from error
        # What the first row needs before it.
        self._start = b"\n" if is_cut_short else b"" if first_line else _HEADER + b"\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, sample: Sample) -> None:
        """Append a sample; it is in the file when this returns.

        Raises:
            WriteError: It can't be written.
        """
        content = self._start + format_rows(sample).encode()
        self._start = b""
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise WriteError(
                f"--csv {self._path} can't be written any more: {describe_os_error(error)}.",
                "Make room, or name another file; the same command goes on with this one.",
            ) from error


def _look_at(path: Path) -> tuple[bytes, bool]:
    """Return a file's first line, and whether its last row has no end; of a pipe or device nothing is read."""
    if not path.is_file():
        return b"", False
    with path.open("rb") as file:
        first_line = file.readline(len(_HEADER) + 2)
        if not first_line:
            return b"", False
        file.seek(-1, io.SEEK_END)
        return first_line, file.read() != b"\n"


def _gpu_cells(gpu: GpuSample) -> list[str]:
    num_processes = None if gpu.processes is None else len(gpu.processes)
    problem = gpu.problem.kind if gpu.problem is not None else None
    return [_cell(value) for value in (*(getattr(gpu, name) for name in _GPU_COLUMNS), num_processes, problem)]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "|".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)
