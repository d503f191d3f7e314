"""Loading models and adapters: the same numbers as PEFT's own loading, and damage that is told instead of generated."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dsft.core.errors import ConfigError, ModelError
from dsft.core.models.device import Device
from dsft.core.models.source import find_model
from dsft.infer.load_model import Placement, load_model
from tests.scripted_models import write_adapter, write_random_model

CPU = Device("cpu", "CPU")
FLOAT32 = Placement(CPU, "float32", use_4bit=False)
PROMPT = torch.tensor([[5, 17, 42, 99]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base: Path) -> tuple[Path, PeftModel]:
    folder = base.parent / "trained"
    return folder, write_adapter(folder, base)


@pytest.fixture
def adapter(trained: tuple[Path, PeftModel], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=PROMPT).logits
    return output


def test_an_adapter_gives_what_it_gave_before_it_was_saved(base: Path, trained: tuple[Path, PeftModel]) -> None:
    folder, original = trained
    model = load_model(find_model(str(base)), folder, FLOAT32)
    assert not model.training
    assert torch.equal(logits(model), logits(original))
    with original.disable_adapter():
        assert torch.equal(logits(load_model(find_model(str(base)), None, FLOAT32)), logits(original))
        assert not torch.allclose(logits(model), logits(original), atol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_weights_have_the_type_that_was_asked_for(base: Path, dtype: Any) -> None:
    model = load_model(find_model(str(base)), None, Placement(CPU, dtype, use_4bit=False))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_4bit_quantizes_the_linear_layers_with_and_without_adapter(base: Path, adapter: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    exact, coarse = {}, {}
    for adapter_dir in (None, adapter):
        exact[adapter_dir] = logits(load_model(find_model(str(base)), adapter_dir, FLOAT32))
        model = load_model(find_model(str(base)), adapter_dir, Placement(CPU, "float32", use_4bit=True))
        quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
        assert len(quantized) == 2 * 7
        assert all(module.weight.quant_state.nested for module in quantized)
        assert {module.weight.quant_state.quant_type for module in quantized} == {"nf4"}
        coarse[adapter_dir] = logits(model)
    for adapter_dir, other in ((None, adapter), (adapter, None)):
        own, others = (correlate(coarse[adapter_dir], exact[which]) for which in (adapter_dir, other))
        assert others < own < 0.9999


def test_a_quantized_model_is_loaded_as_it_is_and_not_quantized_again(base: Path, tmp_path: Path) -> None:
    quantized = load_model(find_model(str(base)), None, Placement(CPU, "float32", use_4bit=True))
    quantized.save_pretrained(tmp_path / "quantized")
    source = find_model(str(tmp_path / "quantized"))
    assert torch.equal(logits(load_model(source, None, FLOAT32)), logits(quantized))
    with pytest.raises(ConfigError, match="quantized already"):
        load_model(source, None, Placement(CPU, "float32", use_4bit=True))


def correlate(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_a_pickled_adapter_is_read_without_running_code(base: Path, adapter: Path) -> None:
    expected = logits(load_model(find_model(str(base)), adapter, FLOAT32))
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    assert torch.equal(logits(load_model(find_model(str(base)), adapter, FLOAT32)), expected)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("trapped"),)


def test_a_pickle_that_would_run_code_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": _Trap()}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(find_model(str(base)), adapter, FLOAT32)
    assert not (tmp_path / "trapped").exists()


def break_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "layers.1" in name)]


def break_surplus(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1" in name]:
        tensors[name.replace("layers.1", "layers.2")] = tensors[name].clone()


def break_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def break_infinite(tensors: dict[str, torch.Tensor]) -> None:
    next(reversed(tensors.values()))[0, 0] = float("inf")


def break_shape(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        tensors[name] = torch.cat([tensor, tensor], dim=1 if "lora_A" in name else 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, r"incomplete .*layers\.1.*missing"),
        (break_surplus, r"belongs to another model.*layers\.2"),
        (break_nan, "NaN"),
        (break_infinite, "infinite"),
        (break_shape, "does not fit the base model"),
    ],
)
def test_a_damaged_adapter_is_refused(base: Path, adapter: Path, damage: Any, message: str) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    damage(tensors)
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=message):
        load_model(find_model(str(base)), adapter, FLOAT32)


def test_a_cut_file_is_refused(base: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"adapter .* can't be loaded"):
        load_model(find_model(str(base)), adapter, FLOAT32)
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        load_model(find_model(str(base)), adapter, FLOAT32)


def test_a_base_with_missing_weights_is_refused_instead_of_filled_with_random_numbers(
    base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: model\.norm\.weight"):
        load_model(find_model(str(folder)), None, FLOAT32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(find_model(str(folder)), None, FLOAT32)
