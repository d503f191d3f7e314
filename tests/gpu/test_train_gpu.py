"""`dsft train` on a CUDA device: its losses beside the CPU's, both 16-bit types, resume, and memory in the summary."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import RunDsft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS = 12
COMMAND = ("train", "--preset", "tiny", "--device", "cuda", "--max-steps", str(STEPS), "--save-steps", "6")


def summary(folder: Path) -> dict:
    return json.loads((folder / "trained_tiny" / "training_summary.json").read_text(encoding="utf-8"))


def train(run_dsft: RunDsft, folder: Path, *flags: str) -> dict:
    folder.mkdir()
    done = run_dsft(*COMMAND, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return summary(folder)


def losses(told: dict) -> list[float]:
    return [loss for _, loss in told["losses"]]


def test_float32_losses_are_the_cpu_s(run_dsft: RunDsft, tmp_path: Path) -> None:
    gpu = train(run_dsft, tmp_path / "gpu", "--precision", "fp32")
    cpu = train(run_dsft, tmp_path / "cpu", "--precision", "fp32", "--device", "cpu")
    np.testing.assert_allclose(losses(gpu), losses(cpu), rtol=1e-3)
    assert gpu["validation_losses"][-1][1] == pytest.approx(cpu["validation_losses"][-1][1], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_training_follows_float32_and_reports_its_memory(
    run_dsft: RunDsft, tmp_path: Path, precision: str
) -> None:
    told = train(run_dsft, tmp_path / precision, "--precision", precision)
    exact = train(run_dsft, tmp_path / "fp32", "--precision", "fp32")
    np.testing.assert_allclose(losses(told), losses(exact), rtol=0.03)
    assert losses(told)[-1] < losses(told)[0]
    assert "variable-length" in told["techniques"]["attention"]
    assert "paged" in told["techniques"]["optimizer"]
    allocated, reserved = told["peak_memory_allocated_bytes"], told["peak_memory_reserved_bytes"]
    assert 0 < allocated <= reserved < told["peak_memory_device_bytes"] <= told["memory_total_bytes"]


def test_the_micro_batch_does_not_change_the_losses(run_dsft: RunDsft, tmp_path: Path) -> None:
    whole = train(run_dsft, tmp_path / "whole")
    split = ("--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "8", "--gradient-checkpointing")
    np.testing.assert_allclose(losses(train(run_dsft, tmp_path / "split", *split)), losses(whole), rtol=0.02)


def test_packed_training_learns(run_dsft: RunDsft, tmp_path: Path) -> None:
    told = train(run_dsft, tmp_path / "packed", "--packing", "--gradient-accumulation-steps", "2")
    assert losses(told)[-1] < losses(told)[0]
    assert told["validation_losses"][-1][1] < told["validation_losses"][0][1]


def test_a_run_stopped_by_a_signal_goes_on_where_it_was(run_dsft: RunDsft, tmp_path: Path) -> None:
    whole = train(run_dsft, tmp_path / "whole")
    folder = tmp_path / "stopped"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "dsft", *COMMAND, "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "StepDone" and event["step"] == 3:
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait(timeout=60) == 75
    resumed = run_dsft(*COMMAND, "--resume", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    np.testing.assert_allclose(losses(summary(folder)), losses(whole), rtol=0.02)


def test_a_paged_optimizer_s_loaded_state_is_paged_again(tmp_path: Path) -> None:
    from bitsandbytes.optim import PagedAdamW32bit

    from dsft.train.restore import page_optimizer_state

    def make() -> tuple[torch.nn.Parameter, PagedAdamW32bit]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))
        return weight, PagedAdamW32bit([weight], lr=1e-2)

    def step(weight: torch.nn.Parameter, optimizer: PagedAdamW32bit) -> None:
        weight.grad = torch.sin(weight.detach())
        optimizer.step()

    weight, optimizer = make()
    step(weight, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed_weight, resumed = make()
    resumed_weight.data.copy_(weight.data)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    page_optimizer_state(resumed)
    assert all(getattr(resumed.state[resumed_weight][name], "is_paged", False) for name in ("state1", "state2"))
    step(weight, optimizer)
    step(resumed_weight, resumed)
    assert torch.equal(weight, resumed_weight)
