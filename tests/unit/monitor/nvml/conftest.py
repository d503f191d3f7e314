"""Time that passes when a test says so, for all that reads NVML."""

import pytest

from tests.monitor_readers import FakeClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    for module in ("gpus", "device", "mig"):
        monkeypatch.setattr(f"dsft.monitor.nvml.{module}.monotonic", clock)
    return clock
