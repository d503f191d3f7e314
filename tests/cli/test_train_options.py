"""The options of `dsft train`: which there are, how they are spelt, and what reaches the configuration."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from dsft.cli.app import build, main
from dsft.core.config.describe import format_value
from dsft.core.config.load import ResolvedConfig, load_train_config
from dsft.core.config.schema import TrainConfig
from dsft.core.config.yaml_file import read_scalar

Train = Callable[..., ResolvedConfig]

# A change here is a change for everyone who has a script: add freely, rename and remove with a word in the changelog.
FROZEN_OPTIONS = {
    "--preset", "--config", "--resume", "--overwrite", "--dry-run", "--json", "--quiet", "--help", "-h",
    "--model-name", "--model-revision", "--dataset", "--dataset-revision", "--dataset-split", "--bad-rows",
    "--template", "--loss-on", "--max-length", "--over-length", "--max-samples", "--packing", "--no-packing",
    "--validation-split", "--validation-dataset",
    "--lora-r", "--lora-alpha", "--lora-dropout",
    "--epochs", "--max-steps", "--per-device-train-batch-size", "--gradient-accumulation-steps", "--learning-rate",
    "--lr-scheduler", "--warmup-ratio", "--weight-decay", "--max-grad-norm", "--optimizer", "--seed",
    "--gradient-checkpointing", "--no-gradient-checkpointing", "--use-flash-attention", "--no-use-flash-attention",
    "--plan", "--vram", "--micro-batch", "--recompute-blocks", "--page-optimizer", "--engine",
    "--device", "--precision", "--dataloader-num-workers",
    "--output-dir", "--save-dir", "--save-steps", "--save-total-limit", "--keep",
}  # fmt: skip


def train_options() -> set[str]:
    group = build()
    with group.make_context("dsft", ["train"], resilient_parsing=True) as context:
        _, command, _ = group.resolve_command(context, ["train"])
        return {name for option in command.get_params(context) for name in (*option.opts, *option.secondary_opts)}


def test_the_options_are_the_frozen_ones() -> None:
    assert train_options() == FROZEN_OPTIONS


def test_help_shows_every_option_whole_with_default_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for option in FROZEN_OPTIONS:
        shown = re.sub("^--(no-)?(packing|gradient-checkpointing|use-flash-attention)$", r"--[no-]\2", option)
        assert f"{shown} " in text or f"{shown}, " in text, option
    words = " ".join(text.split())
    for word in ("cosine", "truncate", "fp16", "deepseek", "[default: 1024]", "[default: 0.0002]", "[default: on]"):
        assert word in words
    assert max(len(line) for line in text.splitlines()) <= 80
    for panel in ("Model and data", "LoRA", "Optimization", "Execution", "Files", "Run"):
        assert f"\n {panel} " in text


def test_dashes_and_underscores_are_the_same_and_values_stay_as_they_are(train: Train) -> None:
    resolved = train(
        "--max_length", "512", "--output-dir=a_b-c", "--model_name", "my_org/my-model", "--no_gradient_checkpointing",
        "--optimizer", "adamw", "--use_flash_attention", "--per-device_train-batch_size", "2",
    )  # fmt: skip
    config = resolved.config
    assert (config.max_length, config.output_dir, config.model_name) == (512, "a_b-c", "my_org/my-model")
    assert (config.gradient_checkpointing, config.use_flash_attention) == (False, True)
    assert (config.optimizer, config.per_device_train_batch_size) == ("adamw", 2)
    assert resolved.origins["max_length"] == "--max-length"
    assert resolved.origins["gradient_checkpointing"] == "--no-gradient-checkpointing"


def test_a_flag_with_its_defaults_value_still_overrides_the_preset(train: Train) -> None:
    resolved = train("--preset", "quality", "--max-length", "1024", "--no-use-flash-attention")
    assert (resolved.config.max_length, resolved.config.use_flash_attention) == (1024, False)
    assert resolved.origins["lora_r"] == "preset quality"


def test_without_flags_the_defaults_hold(train: Train) -> None:
    resolved = train()
    assert resolved.config == TrainConfig()
    assert set(resolved.origins.values()) == {"default"}


def test_a_configuration_file_is_read(train: Train, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("lora_r: 8\nlearning_rate: 2e-4\n")
    resolved = train("--preset", "tiny", "--config", "my.yaml", "--learning-rate", "1E-3")
    assert (resolved.config.lora_r, resolved.origins["lora_r"]) == (8, "my.yaml:1")
    assert (resolved.config.learning_rate, resolved.origins["learning_rate"]) == (1e-3, "--learning-rate")


def seed_command_lines(seed: str) -> list[list[str]]:
    """Return the arguments of each training command line of the seed document, whole ones and fragments."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", seed, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[:2] == ["python", "finetune_deepseek_optimized.py"]:
                found.append(words[2:])
            elif line.startswith("--"):
                found.append(words)
    return found


def test_each_command_line_of_the_seed_parses(shared: Path, train: Train) -> None:
    lines = seed_command_lines((shared / "seed-readme.pt.md").read_text(encoding="utf-8"))
    assert len(lines) == 12
    for args in lines:
        resolved = train(*args)
        for flag, following in zip(args, [*args[1:], "--"], strict=True):
            if flag.startswith("--"):
                name = flag.removeprefix("--")
                written = "true" if following.startswith("--") else following
                assert format_value(getattr(resolved.config, name)) == format_value(read_scalar(written))
                assert resolved.origins[name] == flag.replace("_", "-")


def test_every_flag_of_the_seeds_table_has_its_default(shared: Path) -> None:
    seed = (shared / "seed-readme.pt.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--(\w+)` \| `([^`]+)` \|", seed, flags=re.MULTILINE)
    assert len(rows) == 10
    for name, default in rows:
        assert load_train_config(flags={name: default}).config == TrainConfig(), name


def test_numbers_are_judged_by_the_schema_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "--lora_r", "abc", "--epochs", "-1", "--seed", "1.5", "--lr-scheduler", "cosin", "--preset", "tny"]
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[:6] == [
        "error: 5 settings are wrong:",
        "  --preset: there is no preset 'tny' (did you mean tiny?).",
        "  --lora-r is abc, but must be a whole number from 1 to 1024.",
        "  --epochs is -1, but must be a number above 0.",
        "  --lr-scheduler is cosin, but must be one of cosine, linear, constant (did you mean cosine?).",
        "  --seed is 1.5, but must be a whole number of at least 0 and below 4294967296.",
    ]


def test_resume_and_overwrite_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--overwrite"]) == 2
    assert "--resume and --overwrite contradict each other" in capsys.readouterr().err
