"""Which layer wins, where each value came from, and that everything wrong is told at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsft.core.config.load import load_train_config
from dsft.core.config.schema import DEFAULT_DATASET_REVISION, TrainConfig
from dsft.core.errors import ConfigError, ExitCode

WriteFile = Callable[[str], Path]


@pytest.fixture
def write_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    """Write `my.yaml` and stand beside it, so that messages name it as a user would."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("my.yaml").write_text(text, encoding="utf-8")
        return Path("my.yaml")

    return write


def problems_of(preset: str | None = None, file: Path | None = None, flags: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_train_config(preset, file, flags)
    assert caught.value.exit_code == ExitCode.WRONG_INPUT
    assert caught.value.fix
    return [line.strip() for line in caught.value.found.splitlines()]


def test_without_anything_all_values_are_defaults() -> None:
    resolved = load_train_config()
    assert resolved.config == TrainConfig()
    assert set(resolved.origins) == set(TrainConfig.model_fields)
    assert set(resolved.origins.values()) == {"default"}


def test_flag_over_file_over_preset_over_default(write_file: WriteFile) -> None:
    file = write_file("max_length: 700\nepochs: 2\n\nlearning-rate: 2e-4\n")
    resolved = load_train_config("conservative", file, {"max_length": "300"})
    config, origins = resolved.config, resolved.origins
    assert (config.max_length, origins["max_length"]) == (300, "--max-length")
    assert (config.epochs, origins["epochs"]) == (2, "my.yaml:2")
    assert (config.learning_rate, origins["learning_rate"]) == (2e-4, "my.yaml:4")
    assert (config.lora_r, origins["lora_r"]) == (32, "preset conservative")
    assert (config.seed, origins["seed"]) == (42, "default")


def test_flags_are_texts_read_as_the_settings_type() -> None:
    flags = {"lora-r": "16", "learning_rate": "1e-3", "max_samples": "1e2", "packing": True, "dataset": "0123"}
    config = load_train_config(flags=flags).config
    assert (config.lora_r, config.learning_rate, config.max_samples, config.packing) == (16, 1e-3, 100, True)
    assert config.dataset == "0123"


def test_a_switched_off_flag_is_named_as_it_was_written() -> None:
    assert load_train_config(flags={"gradient_checkpointing": False}).origins["gradient_checkpointing"] == (
        "--no-gradient-checkpointing"
    )


def test_values_given_in_python_keep_their_type() -> None:
    assert load_train_config(flags={"lora_r": 16, "max_samples": None}).config.lora_r == 16
    assert problems_of(flags={"lora_r": True}) == ["--lora-r is True, but must be a whole number from 1 to 1024."]


@pytest.mark.parametrize(
    ("preset", "text", "flags", "alpha", "origin"),
    [
        (None, "", {"lora_r": "8"}, 16, "2 x lora_r"),
        ("quality", "", {"lora_r": "8"}, 16, "2 x lora_r"),
        ("quality", "lora_r: 8", {}, 16, "2 x lora_r"),
        (None, "lora_alpha: 5", {"lora_r": "8"}, 16, "2 x lora_r"),
        (None, "lora_r: 8\nlora_alpha: 5", {}, 5, "my.yaml:2"),
        (None, "lora_r: 8", {"lora_alpha": "5"}, 5, "--lora-alpha"),
        ("quality", "", {"lora_alpha": "5"}, 5, "--lora-alpha"),
        ("quality", "", {}, 256, "preset quality"),
        (None, "", {}, 128, "default"),
    ],
)
def test_alpha_follows_the_rank_unless_it_is_given(
    write_file: WriteFile, preset: str | None, text: str, flags: dict[str, str], alpha: float, origin: str
) -> None:
    resolved = load_train_config(preset, write_file(text), flags)
    assert (resolved.config.lora_alpha, resolved.origins["lora_alpha"]) == (alpha, origin)


def test_a_revision_stays_with_the_data_set_it_is_of(write_file: WriteFile) -> None:
    assert load_train_config("balanced").config.dataset_revision == DEFAULT_DATASET_REVISION
    other = load_train_config("balanced", flags={"dataset": "someone/else"})
    assert (other.config.dataset_revision, other.origins["dataset_revision"]) == (None, "default")
    same = load_train_config("balanced", flags={"dataset": "sahil2801/CodeAlpaca-20k"})
    assert same.config.dataset_revision == DEFAULT_DATASET_REVISION
    file = write_file("dataset_split: test\n")
    assert load_train_config("balanced", file, {"dataset": "someone/else"}).config.dataset_split == "test"


def test_tinys_validation_set_is_not_used_for_other_data() -> None:
    config = load_train_config("tiny", flags={"dataset": "mine.jsonl"}).config
    assert config.validation_dataset is None
    assert config.validation_split == TrainConfig().validation_split


def test_everything_wrong_in_preset_file_and_flags_is_told_at_once(write_file: WriteFile) -> None:
    file = write_file(
        "lora_rank: 8\nlr_scheduler: cosin\npacking: yes\nepochs: .inf\ndataset_revision: 1234567\n"
        "seed: [1]\nweight_decay:\nepochs: 1\n"
    )
    assert problems_of("balancd", file, {"lora_r": "0", "max_length": "abc"}) == [
        "11 settings are wrong:",
        "--preset: there is no preset 'balancd' (did you mean balanced?).",
        "my.yaml:8: epochs is already set in line 4.",
        "my.yaml:1: lora_rank is no setting (did you mean lora_r?).",
        "my.yaml:2: lr_scheduler is cosin, but must be one of cosine, linear, constant (did you mean cosine?).",
        "my.yaml:3: packing is yes, but must be true or false.",
        "my.yaml:4: epochs is .inf, but must be a number above 0 (and finite).",
        "my.yaml:5: dataset_revision is 1234567, but must be text, or null (put it in quotes).",
        "my.yaml:6: seed is a list, but must be a whole number of at least 0 and below 4294967296.",
        "my.yaml:7: weight_decay is empty, but must be a number of at least 0.",
        "--lora-r is 0, but must be a whole number from 1 to 1024.",
        "--max-length is abc, but must be a whole number of at least 8.",
    ]


def test_a_wrong_value_is_told_even_where_a_flag_overrides_it(write_file: WriteFile) -> None:
    file = write_file("lora_r: -1\n")
    assert problems_of(None, file, {"lora_r": "8"}) == [
        "my.yaml:1: lora_r is -1, but must be a whole number from 1 to 1024."
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora_r: yes", "lora_r is yes"),
        ("lora_r: true", "lora_r is true"),
        ('lora_r: "64"', 'lora_r is "64"'),
        ("lora_r: 6.5", "lora_r is 6.5"),
        ("epochs: true", "epochs is true"),
        ("packing: 1", "packing is 1"),
        ("model_name: 1e3", "model_name is 1e3"),
        ("learning_rate: .nan", "learning_rate is .nan"),
        ("output_dir: ''", 'output_dir is ""'),
    ],
)
def test_a_value_of_another_type_is_not_guessed_into_place(write_file: WriteFile, line: str, expected: str) -> None:
    [problem] = problems_of(file=write_file(line + "\n"))
    assert problem.startswith(f"my.yaml:1: {expected}, but must be ")


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("lora_rank", "lora_r"), ("alpha", "lora_alpha"), ("batch_size", "per_device_train_batch_size")],
)
def test_an_unknown_key_brings_the_nearest_name(write_file: WriteFile, key: str, suggestion: str) -> None:
    assert problems_of(file=write_file(f"{key}: 1\n")) == [
        f"my.yaml:1: {key} is no setting (did you mean {suggestion}?)."
    ]


def test_a_long_value_is_shortened(write_file: WriteFile) -> None:
    [problem] = problems_of(file=write_file(f"lora_r: {'x' * 500}\n"))
    assert len(problem) < 150


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        load_train_config("huge")
    assert caught.value.fix == "The presets are balanced, conservative, quality, tiny."
    with pytest.raises(ConfigError):
        load_train_config("../presets/tiny")


def test_a_contradiction_names_the_place_of_the_setting(write_file: WriteFile) -> None:
    [problem] = problems_of(file=write_file("validation_split: 0\nkeep: best\n"))
    assert problem.startswith("my.yaml:2: keep: best needs a validation loss")


def test_a_presets_file_can_be_copied_and_used_as_a_configuration(repository: Path) -> None:
    copied = load_train_config(config_file=repository / "presets" / "quality.yaml")
    assert copied.config == load_train_config("quality").config


def test_folders_under_the_home_folder_are_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "my.yaml"
    file.write_text("output_dir: ~/results\nsave_dir: ./trained\n")
    config = load_train_config(config_file=file).config
    assert (config.output_dir, config.save_dir) == (f"{tmp_path}/results", "./trained")
