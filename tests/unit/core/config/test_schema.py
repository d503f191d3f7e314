"""The schema against the seed's and the specification's defaults, and its own consistency."""

import pytest
from pydantic import ValidationError

from dsft.core.config.describe import describe_settings, format_value
from dsft.core.config.schema import (
    DEFAULT_DATASET_REVISION,
    EXECUTION_FIELDS,
    FILE_FIELDS,
    SECTION_STARTS,
    TrainConfig,
    recipe,
)


def test_the_defaults_are_the_specified_ones() -> None:
    specified = {
        "model_name": "deepseek-ai/deepseek-coder-6.7b-base",
        "output_dir": "./results_deepseek",
        "save_dir": "./trained_deepseek",
        "epochs": 3,
        "max_length": 1024,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "lora_r": 64,
        "lora_alpha": 128,
        "learning_rate": 2e-4,
        "use_flash_attention": False,
        "packing": False,
        "max_samples": None,
        "save_steps": 250,
        "save_total_limit": 2,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "max_grad_norm": 0.3,
        "lora_dropout": 0,
        "weight_decay": 0,
        "optimizer": "paged_adamw_32bit",
        "loss_on": "response",
    }
    assert TrainConfig().model_dump(include=set(specified)) == specified


def test_the_commit_of_the_default_data_set_is_not_used_for_another() -> None:
    assert TrainConfig().dataset_revision == DEFAULT_DATASET_REVISION
    assert TrainConfig(dataset="mine.jsonl").dataset_revision is None
    assert TrainConfig(dataset="someone/else", dataset_revision="main").dataset_revision == "main"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_setting_is_infinite(value: float) -> None:
    with pytest.raises(ValidationError):
        TrainConfig(epochs=value)


def test_the_recipe_counts_micro_batches_by_their_product_and_leaves_execution_out() -> None:
    one = TrainConfig(per_device_train_batch_size=1, gradient_accumulation_steps=16)
    other = TrainConfig(per_device_train_batch_size=8, gradient_accumulation_steps=2, device="cpu", save_steps=3)
    assert recipe(one) == recipe(other)
    assert recipe(one) != recipe(TrainConfig(gradient_accumulation_steps=8))


def test_sections_cover_the_fields_that_are_named_elsewhere() -> None:
    sections: dict[str, set[str]] = {}
    for setting in describe_settings().values():
        sections.setdefault(setting.section, set()).add(setting.name)
    assert list(sections) == list(SECTION_STARTS.values())
    assert sections["Execution"] == EXECUTION_FIELDS
    assert sections["Files"] == FILE_FIELDS


def test_every_setting_is_described() -> None:
    assert list(describe_settings()) == list(TrainConfig.model_fields)
    for setting in describe_settings().values():
        assert setting.help.endswith("."), setting.name


@pytest.mark.parametrize(
    ("name", "requirement"),
    [
        ("lora_r", "a whole number from 1 to 1024"),
        ("max_length", "a whole number of at least 8"),
        ("max_samples", "a whole number of at least 1, or null"),
        ("learning_rate", "a number above 0 and at most 1"),
        ("validation_split", "a number of at least 0 and below 1"),
        ("packing", "true or false"),
        ("keep", "one of last, best"),
        ("model_name", "text that is not empty"),
        ("model_revision", "text, or null"),
    ],
)
def test_limits_are_said_in_plain_words(name: str, requirement: str) -> None:
    assert describe_settings()[name].requirement == requirement


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "true"), (128.0, "128"), (2e-4, "0.0002"), (4294967295, "4294967295"), (1 / 3, repr(1 / 3))],
)
def test_values_are_written_as_people_do(value: object, text: str) -> None:
    assert format_value(value) == text
