"""Every shipped preset, against the specification's table."""

from pathlib import Path

import pytest

from dsft.core.config import presets
from dsft.core.config.load import load_train_config
from dsft.core.config.presets import Reference, list_presets
from dsft.core.config.schema import DEFAULT_DATASET, DEFAULT_DATASET_REVISION, TrainConfig
from dsft.core.errors import ConfigError

SPECIFIED = {
    "conservative": (512, 32, 64, 8, 8, False, Reference(18, 1200, 45)),
    "balanced": (1024, 64, 128, 16, 16, False, Reference(20, 1000, 55)),
    "quality": (2048, 128, 256, 32, 32, True, Reference(22, 800, 70)),
}


@pytest.mark.parametrize("name", SPECIFIED)
def test_a_gpu_preset_is_as_specified(name: str) -> None:
    max_length, rank, alpha, accumulation, effective, use_flash, reference = SPECIFIED[name]
    config = load_train_config(name).config
    assert (config.max_length, config.lora_r, config.lora_alpha) == (max_length, rank, alpha)
    assert (config.gradient_accumulation_steps, config.effective_batch_size) == (accumulation, effective)
    assert config.use_flash_attention is use_flash
    assert (config.dataset, config.dataset_revision) == (DEFAULT_DATASET, DEFAULT_DATASET_REVISION)
    assert {preset.name: preset.reference for preset in list_presets()}[name] == reference


@pytest.mark.parametrize("name", SPECIFIED)
def test_a_gpu_preset_leaves_all_else_at_its_default(name: str) -> None:
    stated = {"max_length", "lora_r", "lora_alpha", "gradient_accumulation_steps", "use_flash_attention"}
    assert load_train_config(name).config.model_dump(exclude=stated) == TrainConfig().model_dump(exclude=stated)


def test_balanced_is_the_default() -> None:
    assert load_train_config("balanced").config == TrainConfig()


def test_tiny_needs_no_gpu_and_no_hub_and_writes_its_own_folders() -> None:
    config = load_train_config("tiny").config
    assert config.device == "cpu"
    assert (config.output_dir, config.save_dir) == ("./results_tiny", "./trained_tiny")
    for name in (config.model_name, config.dataset, config.validation_dataset):
        assert name is not None
        assert name.startswith("builtin:tiny/")
    assert config.lora_alpha == 2 * config.lora_r


def test_presets_are_listed_from_small_to_large() -> None:
    assert [preset.name for preset in list_presets()] == ["tiny", "conservative", "balanced", "quality"]
    assert all(preset.description for preset in list_presets())


def test_a_damaged_reference_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "presets_dir", lambda: tmp_path)
    (tmp_path / "mine.yaml").write_text("lora_r: 8\nreference: {memory_gb: many}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2: reference must hold the numbers memory_gb"):
        list_presets()
