"""A merge computed on a CUDA device: the CPU's weights but for the last bit, verified there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsft.core.models.device import DeviceChoice
from dsft.merge.config import BaseRounding, MergeConfig
from dsft.merge.result import MergeResult
from dsft.merge.run import run_merge
from tests.scripted_models import write_adapter, write_random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = write_random_model(folder / "base", hidden_size=512, intermediate_size=1408, num_hidden_layers=4)
    write_adapter(folder / "adapter", base)
    return folder / "adapter"


def merge(adapter: Path, output: Path, device: DeviceChoice, base_rounding: BaseRounding = "none") -> MergeResult:
    config = MergeConfig(str(adapter), output, device=device, base_rounding=base_rounding)
    return run_merge(config, lambda event: None)


def is_within_one_step(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether weights are the same or neighbours in their type.

    Where base and update cancel out, what is left is the float32 product's own error, many steps at that size.
    """
    places = []
    for tensor in (first, second):
        bits = tensor.view(torch.int16).int()
        places.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))  # sign and magnitude
    is_neighbour = (places[0] - places[1]).abs() <= 1
    is_noise = (first.float() - second.float()).abs() <= 2**-20 * first.float().abs().max()
    return bool((is_neighbour | is_noise).all())


def test_weights_are_the_cpu_s_within_one_step_of_the_type(adapter: Path, tmp_path: Path) -> None:
    on_cpu, on_gpu = merge(adapter, tmp_path / "cpu", "cpu"), merge(adapter, tmp_path / "cuda", "cuda")
    assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "cuda"))
    assert expected.keys() == found.keys()
    assert all(is_within_one_step(expected[name], found[name]) for name in expected)
    num_same = sum(int((expected[name] == found[name]).sum()) for name in expected)
    assert num_same > 0.999 * on_cpu.num_parameters
    assert on_cpu.verification is not None and on_gpu.verification is not None
    assert on_gpu.verification.mean_kl == pytest.approx(on_cpu.verification.mean_kl, rel=0.1)


def test_a_merge_into_the_nf4_round_trip_verifies_on_the_gpu(adapter: Path, tmp_path: Path) -> None:
    result = merge(adapter, tmp_path / "out", "cuda", "nf4")
    assert (result.device, result.base_rounding) == ("cuda", "nf4")
    assert result.verification is not None
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    base = load_file(adapter.parent / "base" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, base.to(torch.bfloat16))
