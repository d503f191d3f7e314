"""Memory on a CUDA device: what a run predicts of it, and what it does when it is taken away."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def disturbed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Three runs of the embedded model in float32: left alone, with memory taken, with a lower limit."""
    output = tmp_path_factory.mktemp("out") / "result.json"
    settings = "precision=fp32 learning_rate=1e-3 gradient_accumulation_steps=64 max_length=256 validation_split=0"
    done = subprocess.run(
        [sys.executable, repository / "scripts" / "force_out_of_memory.py", "builtin:tiny/model",
         "builtin:tiny/tasks-train.jsonl", "--output", output, "--set", *settings.split()],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("way", ["another allocation", "limit lowered"])
def test_a_run_whose_memory_is_taken_goes_on_with_the_same_losses(disturbed: dict, way: str) -> None:
    run = disturbed[way]
    assert run["plan_changes"], "memory was never short"
    assert run["events"][0]["step"] == 4  # the memory stays away, so later steps may be short of it as well
    assert run["losses"] == pytest.approx(disturbed["undisturbed"]["losses"], rel=1e-4)
    assert not disturbed["undisturbed"]["plan_changes"]


def test_the_summary_has_predicted_and_measured_peaks(disturbed: dict) -> None:
    summary = disturbed["undisturbed"]["summary"]
    for kind in ("allocated", "reserved", "device"):
        assert summary[f"predicted_memory_{kind}_bytes"] > 0
        assert summary[f"peak_memory_{kind}_bytes"] > 0
    # The embedded model is far smaller than what the arithmetic is for, but the device's own part dominates.
    assert summary["predicted_memory_device_bytes"] == pytest.approx(summary["peak_memory_device_bytes"], rel=0.25)
