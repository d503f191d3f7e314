"""The plain path, to hold dsft against: what a user writes with transformers, peft and bitsandbytes alone.

Padded micro-batches of the written size, all blocks recomputed, norms, embeddings and head in float32, transformers'
own attention choice "sdpa" and loss, paged AdamW. Same samples, same effective batch.
"""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from dsft.bench.figures import StepFigures
from dsft.bench.measure import StepClock
from dsft.bench.setup import RowSetup
from dsft.core.models.device import torch_dtype
from dsft.core.models.load import LoraSettings, attach_lora, keep_weights_trainable_through
from dsft.train.batches import EffectiveBatch, EffectiveBatchLoader

_IGNORED = -100
"""The label that transformers' loss passes over."""


def load_plain(setup: RowSetup) -> Any:
    """Load a row's base model as the plain path does."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch_dtype(setup.precision)
    model = AutoModelForCausalLM.from_pretrained(
        setup.source.location,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        device_map={"": setup.torch_device},
        **setup.source.load_arguments,
    )
    keep_weights_trainable_through(model)
    with warnings.catch_warnings():
        # peft 0.21 calls methods that transformers 5.20 renamed; ends with peft's next release.
        warnings.simplefilter("ignore", FutureWarning)
        return prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
        )


def measure_plain(base: Any, setup: RowSetup, num_steps: int, clock: StepClock) -> list[StepFigures]:
    """Run and time steps of the plain path.

    Args:
        base: A model from `load_plain`; given back as it was.
        setup: The row.
        num_steps: Steps to keep, after those of the clock's warm-up.
        clock: Times them.
    """
    config = setup.config
    model = attach_lora(base, LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, config.seed))
    try:
        model.train()
        optimizer = _make_optimizer(model, setup)
        scaler = torch.amp.GradScaler(setup.device.kind, enabled=setup.precision == "fp16")
        batches = _batches(setup)
        for _ in range(clock.num_warmup_steps + num_steps):
            clock.begin()
            batch = next(batches)
            num_targets = sum(int(sample.is_target[1:].sum()) for sequence in batch for sample in sequence)
            _run_micro_batches(model, batch, max(num_targets, 1), scaler, setup, clock)
            scaler.unscale_(optimizer)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            clock.end(sum(len(sample.token_ids) for sequence in batch for sample in sequence), num_targets)
        return clock.steps
    finally:
        model.unload()


def pad_sequences(sequences: EffectiveBatch) -> dict[str, torch.Tensor]:
    """Return sequences as a batch padded on the right to the longest: input_ids, attention_mask, labels.

    Samples packed into one sequence follow one another in its row.
    """
    lengths = [sum(len(sample.token_ids) for sample in sequence) for sequence in sequences]
    shape = (len(sequences), max(lengths))
    input_ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, _IGNORED, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        start = 0
        for sample in sequence:
            end = start + len(sample.token_ids)
            token_ids = torch.from_numpy(sample.token_ids)
            input_ids[row, start:end] = token_ids
            mask[row, start:end] = 1
            labels[row, start:end] = torch.where(torch.from_numpy(sample.is_target), token_ids, _IGNORED)
            labels[row, start] = _IGNORED  # nothing of the same sample stands before it
            start = end
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def _run_micro_batches(
    model: Any, batch: EffectiveBatch, num_targets: int, scaler: Any, setup: RowSetup, clock: StepClock
) -> None:
    size = setup.config.per_device_train_batch_size
    for start in range(0, len(batch), size):
        padded = pad_sequences(batch[start : start + size])
        clock.see_padded(padded["input_ids"].numel())
        inputs = {name: tensor.to(setup.torch_device) for name, tensor in padded.items()}
        before_s = time.perf_counter()
        with torch.autocast(setup.device.kind, torch_dtype(setup.precision), enabled=setup.precision != "fp32"):
            # The sum over targets by their number in the whole effective batch, as in transformers' Trainer.
            loss = model(**inputs, num_items_in_batch=num_targets, use_cache=False).loss
        between_s = time.perf_counter()
        scaler.scale(loss).backward()
        clock.add("forward", between_s - before_s)
        clock.add("backward", time.perf_counter() - between_s)


def _make_optimizer(model: Any, setup: RowSetup) -> Any:
    config = setup.config
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if setup.optimizer.state == "bitsandbytes":
        from bitsandbytes.optim import PagedAdamW32bit

        return PagedAdamW32bit(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)


def _batches(setup: RowSetup) -> Iterator[EffectiveBatch]:
    loader = EffectiveBatchLoader(
        setup.data.sequences, effective_batch_size=setup.config.effective_batch_size, seed=setup.config.seed
    )
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1
