"""Generation on a CUDA device: the type by hardware, adapter and 4-bit weights on the device, the CPU's answer."""

from pathlib import Path

import pytest
import torch

from dsft.infer.config import InferConfig
from dsft.infer.result import InferResult
from dsft.infer.run import run_infer
from tests.scripted_models import write_adapter, write_random_model, write_scripted_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def ignore(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_scripted_model(folder / "greeting", "Héy 你😀")
    write_adapter(folder / "adapter", write_random_model(folder / "random"))
    return folder


@pytest.mark.parametrize("use_4bit", [False, True])
def test_auto_takes_the_gpu_and_its_type(models: Path, use_4bit: bool) -> None:
    result = run_infer(InferConfig(model=str(models / "greeting"), use_4bit=use_4bit), "x", ignore, ignore)
    assert (result.text, result.device) == ("Héy 你😀", "cuda")
    assert result.dtype == ("bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16")


def test_an_adapter_answers_on_the_gpu_as_on_the_cpu(models: Path) -> None:
    def answer(device: str) -> InferResult:
        config = InferConfig(model=str(models / "adapter"), device=device, dtype="float32", max_new_tokens=12)  # type: ignore[arg-type]
        return run_infer(config, "x", ignore, ignore)

    assert answer("cuda").text == answer("cpu").text


def test_the_cpu_stays_the_cpu_where_it_is_asked_for(models: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run_infer(InferConfig(model=str(models / "adapter"), device="cpu", max_new_tokens=3), "x", ignore, ignore)
    assert result.device == "cpu"
    assert torch.cuda.max_memory_allocated() == before


def test_an_adapter_on_4bit_weights_answers(models: Path) -> None:
    config = InferConfig(model=str(models / "adapter"), use_4bit=True, max_new_tokens=12)
    assert run_infer(config, "x", ignore, ignore).num_new_tokens > 0
