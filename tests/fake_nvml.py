"""A stand-in for the pynvml module: replays recorded values (tests/data/nvml), with faults where a test wants them.

Constants, error classes and structures are those of the real module, so a misspelt one fails here as it would there.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pynvml as real_nvml

RECORDINGS = Path(__file__).parent / "data" / "nvml"


@dataclass
class FakeGpu:
    """One GPU.

    Attributes:
        calls: Values by call, e.g. `nvmlDeviceGetTemperature(0)`: those of the samples in turn, from the first again
            after the last. `{"error": 3}` is an error of that code.
        migs: Its MIG instances by index; None where one could be and is not.
    """

    calls: dict[str, list[Any]]
    migs: list["FakeGpu | None"] = field(default_factory=list)

    def set(self, call: str, *values: Any) -> None:
        """Let a call tell these values in turn."""
        self.calls[call] = list(values)

    def set_processes(self, pids: Sequence[int], used_bytes: int | None = 2**30, function: str = "Compute") -> None:
        """Let these processes use it."""
        listed = [
            {"pid": pid, "usedGpuMemory": used_bytes, "gpuInstanceId": 2**32 - 1, "computeInstanceId": 2**32 - 1}
            for pid in pids
        ]
        self.set(f"nvmlDeviceGet{function}RunningProcesses", listed)
        busy = [{"pid": pid, "timeStamp": 1, "smUtil": 90 // (place + 1)} for place, pid in enumerate(pids)]
        if "nvmlDeviceGetProcessUtilization" in self.calls:
            self.set("nvmlDeviceGetProcessUtilization", busy)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        error: NVML's code.
        gpu: Index of the GPU; None for NVML as a whole.
        function: Only this function; None for whatever is asked.
        from_sample: From which sample of that GPU on, counted from 0; once it has come it stays.
        from_s: From how many seconds after the first nvmlInit on.
        until_s: Until when.
    """

    error: int
    gpu: int | None = None
    function: str | None = None
    from_sample: int = 0
    from_s: float = 0
    until_s: float = float("inf")


@dataclass(frozen=True)
class _Handle:
    gpu: FakeGpu
    index: int


class FakeNvml:
    """What `import pynvml` would give.

    Args:
        gpus: The GPUs, by index.
        faults: What goes wrong.

    Attributes:
        gpus: As given; tests may change them.
        faults: As given; tests may change them.
        system: What is told of the driver.
        num_calls: How often each function was called.
        is_started: Whether nvmlInit was called more often than nvmlShutdown.
    """

    def __init__(self, gpus: Sequence[FakeGpu], faults: Sequence[Fault] = ()) -> None:
        self.gpus = list(gpus)
        self.faults = list(faults)
        self.system: dict[str, Any] = {
            "nvmlSystemGetDriverVersion": "580.159.04",
            "nvmlSystemGetNVMLVersion": "13.580.159.04",
            "nvmlSystemGetCudaDriverVersion": 13000,
        }
        self.num_calls: Counter[str] = Counter()
        self.is_started = False
        self._started_at_s: float | None = None
        self._num_asked: dict[int, Counter[str]] = {}
        self._come: set[Fault] = set()

    def nvmlInit(self) -> None:
        self.num_calls["nvmlInit"] += 1
        if self._started_at_s is None:
            self._started_at_s = monotonic()
        self._check("nvmlInit")
        self.is_started = True

    def nvmlShutdown(self) -> None:
        self.num_calls["nvmlShutdown"] += 1
        if not self.is_started:
            raise real_nvml.NVMLError(real_nvml.NVML_ERROR_UNINITIALIZED)
        self.is_started = False

    def nvmlDeviceGetCount(self) -> int:
        self._begin("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> _Handle:
        self._begin("nvmlDeviceGetHandleByIndex")
        if not 0 <= index < len(self.gpus):
            raise real_nvml.NVMLError(real_nvml.NVML_ERROR_INVALID_ARGUMENT)
        self._check("nvmlDeviceGetHandleByIndex", _Handle(self.gpus[index], index))
        return _Handle(self.gpus[index], index)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: _Handle) -> int:
        self._begin("nvmlDeviceGetMaxMigDeviceCount", handle)
        return len(handle.gpu.migs)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: _Handle, index: int) -> _Handle:
        self._begin("nvmlDeviceGetMigDeviceHandleByIndex", handle)
        mig = handle.gpu.migs[index]
        if mig is None:
            raise real_nvml.NVMLError(real_nvml.NVML_ERROR_NOT_FOUND)
        return _Handle(mig, handle.index)

    def nvmlDeviceGetFieldValues(self, handle: _Handle, field_ids: Sequence[Any]) -> list[Any]:
        self._begin("nvmlDeviceGetFieldValues", handle)
        return [
            self._field_value(handle, *(wanted if isinstance(wanted, tuple) else (wanted, 0))) for wanted in field_ids
        ]

    def __getattr__(self, name: str) -> Any:
        if name in {"nvmlSystemGetDriverVersion", "nvmlSystemGetNVMLVersion", "nvmlSystemGetCudaDriverVersion"}:
            return lambda: self._tell_system(name)
        real = getattr(real_nvml, name)  # AttributeError where the real module has no such thing
        if name.startswith("nvmlDevice") and callable(real):
            return lambda handle, *arguments: self._tell(name, handle, arguments)
        if name.startswith("nvml") and callable(real) and not isinstance(real, type):
            raise AttributeError(f"the fake has no {name}")
        return real

    def _tell_system(self, name: str) -> Any:
        self.num_calls[name] += 1
        if name != "nvmlSystemGetNVMLVersion":  # the library tells that by itself
            self._check_started()
            self._check(name)
        return _make(self.system[name])

    def _tell(self, name: str, handle: _Handle, arguments: tuple[Any, ...]) -> Any:
        self._begin(name, handle, arguments)
        return _make(self._recorded(handle, name, arguments))

    def _field_value(self, handle: _Handle, field_id: int, scope: int) -> Any:
        value = self._recorded(handle, "field", (field_id, scope) if scope else (field_id,))
        code = value["error"] if isinstance(value, dict) else 0
        amount = 0 if code else value
        return SimpleNamespace(fieldId=field_id, scopeId=scope, nvmlReturn=code, value=SimpleNamespace(uiVal=amount))

    def _recorded(self, handle: _Handle, name: str, arguments: tuple[Any, ...]) -> Any:
        key = _key(name, arguments)
        values = handle.gpu.calls.get(key, [{"error": real_nvml.NVML_ERROR_NOT_SUPPORTED}])
        asked = self._num_asked.setdefault(id(handle.gpu), Counter())
        asked[key] += 1
        return values[(asked[key] - 1) % len(values)]

    def _begin(self, name: str, handle: _Handle | None = None, arguments: tuple[Any, ...] = ()) -> None:
        self.num_calls[name] += 1
        self._check_started()
        self._check(name, handle, arguments)

    def _check_started(self) -> None:
        if not self.is_started:
            raise real_nvml.NVMLError(real_nvml.NVML_ERROR_UNINITIALIZED)

    def _check(self, name: str, handle: _Handle | None = None, arguments: tuple[Any, ...] = ()) -> None:
        now_s = monotonic() - (self._started_at_s or monotonic())
        # What is asked once in each sample was asked as often before as there were samples.
        sample = self._num_asked.get(id(handle.gpu), Counter())[_key(name, arguments)] if handle is not None else 0
        for fault in self.faults:
            is_meant = fault.function in {None, name} and (
                fault.gpu is None or (handle is not None and handle.index == fault.gpu)
            )
            if sample >= fault.from_sample and is_meant:
                self._come.add(fault)
            if is_meant and fault in self._come and fault.from_s <= now_s < fault.until_s:
                raise real_nvml.NVMLError(fault.error)


def _key(name: str, arguments: tuple[Any, ...]) -> str:
    is_timed = name == "nvmlDeviceGetProcessUtilization"
    return f"{name}({','.join(map(str, arguments))})" if arguments and not is_timed else name


def load_gpu(name: str) -> FakeGpu:
    """Return a recorded GPU by the name of its file."""
    return _load(json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8")))


def _load(recording: dict[str, Any]) -> FakeGpu:
    parts = [None if part is None else _load(part) for part in recording.get("migs", [])]
    return FakeGpu({call: list(values) for call, values in recording["calls"].items()}, parts)


def _make(value: Any) -> Any:
    """Return a recorded value as the real module would give it."""
    if isinstance(value, dict) and set(value) == {"error"}:
        raise real_nvml.NVMLError(value["error"])
    if isinstance(value, dict):
        return SimpleNamespace(**value)
    if isinstance(value, list):
        return [_make(part) for part in value]
    return value
