"""Records what NVML answers to `dsft monitor` on this machine, for tests to replay (tests/data/nvml).

    python scripts/record_nvml.py tests/data/nvml/NAME.json --gpu 0 --samples 5 --what "An A100, idle"

Every call that the monitor's reader makes is kept with its value or its error, sample by sample. UUIDs are replaced;
serial numbers are not asked for. Look through the file before it is committed: it names the PIDs of this machine.
"""

import argparse
import ctypes
import json
import re
import time
from pathlib import Path
from typing import Any

import pynvml

from dsft.monitor.nvml.gpus import NvmlGpus

Calls = dict[str, list[Any]]

_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")


class RecordingNvml:
    """Stands between the reader and pynvml, and writes down what passes.

    Args:
        nvml: The module that is asked.

    Attributes:
        calls: By GPU, then by call: the answers in their order.
        parts: By GPU: the calls of its MIG instances by index, None for one that is not made.
    """

    def __init__(self, nvml: Any) -> None:
        self.calls: dict[int, Calls] = {}
        self.parts: dict[int, list[Calls | None]] = {}
        self._nvml = nvml
        self._handles: list[tuple[Any, Calls]] = []  # kept, so that no other object gets the identity of one

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._nvml, name)
        if name.startswith("nvmlDeviceGet") and callable(value):
            return lambda *arguments: self._ask(name, value, arguments)
        return value

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802  # as pynvml has it
        """Return a handle, and remember whose it is."""
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        self._handles.append((handle, self.calls.setdefault(index, {})))
        return handle

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:  # noqa: N802
        """Return the handle of an instance, and remember whose it is."""
        gpu = next(gpu for gpu, calls in self.calls.items() if calls is self._calls_of(handle))
        parts = self.parts.setdefault(gpu, [])
        parts += [None] * (index + 1 - len(parts))
        part = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        calls = parts[index] or {}
        parts[index] = calls
        self._handles.append((part, calls))
        return part

    def nvmlDeviceGetFieldValues(self, handle: Any, field_ids: Any) -> Any:  # noqa: N802
        """Return fields; each is a call of its own in the recording."""
        values = self._nvml.nvmlDeviceGetFieldValues(handle, field_ids)
        for (field_id, scope), value in zip(field_ids, values, strict=True):
            key = f"field({field_id},{scope})" if scope else f"field({field_id})"
            code = int(value.nvmlReturn)
            answer = {"error": code} if code else int(value.value.uiVal)
            self._calls_of(handle).setdefault(key, []).append(answer)
        return values

    def _ask(self, name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
        if not arguments or not self._is_known(arguments[0]):
            return function(*arguments)
        handle, rest = arguments[0], arguments[1:]
        is_timed = name == "nvmlDeviceGetProcessUtilization"  # its argument is a time
        key = f"{name}({','.join(map(str, rest))})" if rest and not is_timed else name
        answers = self._calls_of(handle).setdefault(key, [])
        try:
            answer = function(*arguments)
        except self._nvml.NVMLError as error:
            answers.append({"error": int(error.value)})
            raise
        answers.append(to_json(answer))
        return answer

    def _is_known(self, handle: Any) -> bool:
        return any(known is handle for known, _ in self._handles)

    def _calls_of(self, handle: Any) -> Calls:
        return next(calls for known, calls in self._handles if known is handle)


def to_json(value: Any) -> Any:
    """Return what pynvml gave as JSON can hold it: structures and objects become their fields."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, ctypes.Array)):
        return [to_json(part) for part in value]
    if isinstance(value, ctypes.Structure):
        return {name: to_json(getattr(value, name)) for name, *_ in value._fields_}
    return {name: to_json(part) for name, part in vars(value).items()}


def shorten(calls: Calls) -> Calls:
    """Return calls with one answer instead of many that are the same, and UUIDs that are nobody's."""
    short = {}
    for key, answers in sorted(calls.items()):
        kept = answers[:1] if all(answer == answers[0] for answer in answers) else answers
        short[key] = [_UUID.sub("11111111-2222-3333-4444-555555555555", a) if isinstance(a, str) else a for a in kept]
    return short


def record(nvml: Any, index: int, num_samples: int, interval_s: float) -> dict[str, Any]:
    """Return the recording of one GPU, without the words that describe it.

    Args:
        nvml: The module that is asked.
        index: Of the GPU.
        num_samples: How many samples are read.
        interval_s: From one to the next.
    """
    recorder = RecordingNvml(nvml)
    gpus = NvmlGpus((str(index),), recorder)
    for number in range(num_samples):
        if number:
            time.sleep(interval_s)
        reading = gpus.read(num_pcie_measurements=2)
        problem = reading.problem or reading.gpus[0].problem
        if problem is not None:
            raise SystemExit(f"{problem.found} {problem.fix}")
    gpus.close()
    parts = [part if part is None else {"calls": shorten(part)} for part in recorder.parts.get(index, [])]
    return {"calls": shorten(recorder.calls[index]), **({"migs": parts} if parts else {})}


def main() -> None:
    """Record one GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds")
    parser.add_argument("--what", required=True, help="what is recorded: the card, the driver, what it was doing")
    arguments = parser.parse_args()
    recording = record(pynvml, arguments.gpu, arguments.samples, arguments.interval)
    content = {"what": arguments.what, "source": "recorded", **recording}
    arguments.file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{len(recording['calls'])} calls in {arguments.file}")


if __name__ == "__main__":
    main()
