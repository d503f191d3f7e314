"""The Trainer's arguments out of a training configuration, and which optimizer this device can run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import TrainingArguments

from dsft.core.config.schema import TrainConfig
from dsft.core.errors import ConfigError
from dsft.core.models.device import Device, Precision

MOST_PAGED_WEIGHTS = 2**31 - 2**24
"""bitsandbytes 0.50 counts the values of a tensor in 31 bits and rounds up; what lies between weights counts too."""


@dataclass(frozen=True)
class OptimizerChoice:
    """The optimizer a run takes.

    Attributes:
        name: The Trainer's name for it.
        description: One phrase for the summary.
        state: Whose form its state has in a checkpoint.
        notice: A sentence where it is not the one that was asked for.
    """

    name: str
    description: str
    state: Literal["bitsandbytes", "torch"]
    notice: str | None = None


def choose_optimizer(config: TrainConfig, device: Device, num_lora_weights: int = 0) -> OptimizerChoice:
    """Choose the optimizer: bitsandbytes' paged AdamW on CUDA, PyTorch's AdamW where paging does not exist.

    Raises:
        ConfigError: There are more weights than bitsandbytes can step.
    """
    if device.kind == "cuda":
        if config.optimizer == "paged_adamw_32bit":
            if num_lora_weights > MOST_PAGED_WEIGHTS:
                raise ConfigError(
                    f"LoRA of rank {config.lora_r} has {num_lora_weights:,} weights in this model, and the paged "
                    f"optimizer can step {MOST_PAGED_WEIGHTS:,} at most.",
                    "Lower --lora-r, or take --optimizer adamw.",
                )
            return OptimizerChoice(
                "paged_adamw_32bit", "paged AdamW, 32-bit state that can page to host memory", "bitsandbytes"
            )
        return OptimizerChoice("adamw_torch_fused", "AdamW, fused, 32-bit state", "torch")
    notice = None
    if config.optimizer == "paged_adamw_32bit":
        notice = "The paged optimizer needs CUDA; PyTorch's AdamW with the same settings is used instead."
    return OptimizerChoice("adamw_torch", "AdamW, 32-bit state", "torch", notice)


def count_steps(config: TrainConfig, num_sequences: int) -> int:
    """Return the optimizer steps of a run over `num_sequences` sequences."""
    if config.max_steps is not None:
        return config.max_steps
    return _ceil(config.epochs * math.ceil(num_sequences / config.effective_batch_size))


def count_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Return over how many of a run's steps the learning rate rises."""
    return _ceil(config.warmup_ratio * num_steps)


def _ceil(product: float) -> int:
    return math.ceil(round(product, 9))  # 1.1 x 50 is 55.00000000000001 in floating point


def make_arguments(
    config: TrainConfig,
    *,
    device: Device,
    precision: Precision,
    optimizer: OptimizerChoice,
    num_steps: int,
    has_validation: bool,
    validate_first: bool,
) -> TrainingArguments:
    """Return the Trainer's arguments.

    Args:
        config: The configuration.
        device: Where to train.
        precision: Compute type.
        optimizer: From `choose_optimizer`.
        num_steps: Optimizer steps of the whole run.
        has_validation: Whether there are held-out samples.
        validate_first: Whether to measure the validation loss before the first step.
    """
    arguments = TrainingArguments(
        output_dir=str(Path(config.output_dir)),
        max_steps=num_steps,
        # The effective batch comes as one batch; see QloraTrainer.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=optimizer.name,
        seed=config.seed,
        data_seed=config.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.kind == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=config.save_steps,
        eval_on_start=has_validation and validate_first,
        save_strategy="steps",
        save_steps=config.save_steps,
        remove_unused_columns=False,
        dataloader_num_workers=config.dataloader_num_workers,
        disable_tqdm=True,
        report_to="none",
    )
    _ = arguments.device  # found on first use, and with it the number of GPUs
    arguments._n_gpu = 1  # dsft trains on one GPU; with more of them visible the Trainer would spread the model
    return arguments
