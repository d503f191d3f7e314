from pathlib import Path

import pytest

from dsft.core.config.schema import TrainConfig
from dsft.core.errors import ConfigError
from dsft.core.models.device import Device
from dsft.train.arguments import choose_optimizer, count_steps, count_warmup_steps, make_arguments

CPU = Device("cpu", "CPU")
GPU = Device("cuda", "GPU", (8, 9))


@pytest.mark.parametrize(
    ("epochs", "num_sequences", "effective_batch", "expected"),
    [(3, 100, 16, 21), (1, 10, 16, 1), (1.1, 50, 1, 55), (2.2, 100, 1, 220), (0.07, 100, 1, 7), (0.001, 16, 16, 1)],
)
def test_steps_are_counted_up_to_the_next_whole_one(epochs, num_sequences, effective_batch, expected):
    config = TrainConfig(epochs=epochs, gradient_accumulation_steps=effective_batch)
    assert count_steps(config, num_sequences) == expected


def test_max_steps_decide_alone():
    assert count_steps(TrainConfig(epochs=1, max_steps=7), 16) == 7


def test_warmup_steps_are_a_share_of_all():
    assert count_warmup_steps(TrainConfig(warmup_ratio=0.07), 100) == 7
    assert count_warmup_steps(TrainConfig(warmup_ratio=0.03), 10) == 1
    assert count_warmup_steps(TrainConfig(warmup_ratio=0.0), 10) == 0


def test_the_paged_optimizer_has_an_announced_substitute_on_a_cpu():
    assert choose_optimizer(TrainConfig(), GPU).name == "paged_adamw_32bit"
    substitute = choose_optimizer(TrainConfig(), CPU)
    assert substitute.name == "adamw_torch"
    assert substitute.notice is not None and "CUDA" in substitute.notice
    assert choose_optimizer(TrainConfig(optimizer="adamw"), CPU).notice is None


def test_more_weights_than_the_paged_optimizer_can_count_are_refused():
    count = 2_558_525_440  # of the 6.7B shape at rank 1,024
    with pytest.raises(ConfigError, match=r"rank 1024 has 2,558,525,440 weights.*--optimizer adamw"):
        choose_optimizer(TrainConfig(lora_r=1024), GPU, count)
    assert choose_optimizer(TrainConfig(lora_r=1024, optimizer="adamw"), GPU, count).state == "torch"
    assert choose_optimizer(TrainConfig(lora_r=1024), CPU, count).state == "torch"
    assert choose_optimizer(TrainConfig(lora_r=512), GPU, count // 2).state == "bitsandbytes"


def test_the_trainer_does_not_spread_over_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = make_arguments(
        TrainConfig(output_dir=str(tmp_path)),
        device=CPU,
        precision="fp32",
        optimizer=choose_optimizer(TrainConfig(), CPU),
        num_steps=3,
        has_validation=False,
        validate_first=False,
    )
    assert arguments.n_gpu == 1
    assert not arguments.logging_nan_inf_filter
