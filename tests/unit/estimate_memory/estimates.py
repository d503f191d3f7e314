"""What several tests of estimates need: models small enough to plan in an instant, and a stand-in for the driver."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsft.core.config.load import load_train_config
from dsft.core.config.schema import TrainConfig
from dsft.core.memory.cards import RTX_4090
from dsft.estimate_memory.budget import Budget

BUDGET = Budget(RTX_4090, "default")

SMALL_MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


def write_model(folder: Path, **changes: object) -> str:
    """Write a model's config.json, and nothing else of it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL_MODEL | changes), encoding="utf-8")
    return str(folder)


def configure(**flags: Any) -> TrainConfig:
    """Return a configuration as flags make it."""
    return load_train_config(flags=flags).config


class FakeDriver(ModuleType):
    """Takes the place of pynvml: a driver with some GPUs, or none at all."""

    class NVMLError(Exception):
        """As NVML's."""

    def __init__(self, *gpus: dict[str, Any], counts_cores: bool = True) -> None:
        super().__init__("pynvml")
        self._gpus = gpus
        self._counts_cores = counts_cores
        self.num_open = 0

    def nvmlInit(self) -> None:
        if not self._gpus:
            raise self.NVMLError("Driver Not Loaded")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if index >= len(self._gpus):
            raise self.NVMLError("Invalid Argument")
        return self._gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        for gpu in self._gpus:
            if gpu["uuid"] == uuid:
                return gpu
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetMemoryInfo(self, gpu: dict[str, Any]) -> Any:
        return type("Memory", (), {"total": gpu["total"], "used": gpu["used"]})()

    def nvmlDeviceGetCudaComputeCapability(self, gpu: dict[str, Any]) -> tuple[int, int]:
        return gpu["capability"]  # type: ignore[no-any-return]

    def nvmlDeviceGetNumGpuCores(self, gpu: dict[str, Any]) -> int:
        if not self._counts_cores:
            raise self.NVMLError("Function Not Found")
        return gpu["cores"]  # type: ignore[no-any-return]

    def nvmlDeviceGetName(self, gpu: dict[str, Any]) -> str:
        return gpu["name"]  # type: ignore[no-any-return]


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakeDriver:
    """Let `import pynvml` give this driver."""
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver
