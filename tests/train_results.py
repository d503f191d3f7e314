"""A finished run's result with plausible figures, for tests of what is made of it."""

import math
from typing import Any

from dsft.core.config.schema import TrainConfig
from dsft.core.units import GIB
from dsft.train.events import TrainResult


def make_result(config: dict[str, Any] | None = None, **changes: Any) -> TrainResult:
    """Return the result of a run of the default settings on a GPU, with some settings and fields changed."""
    settings = TrainConfig().model_dump() | (config or {})
    losses = [(step, 0.5 + math.exp(-step / 10)) for step in range(1, 41)]
    fields: dict[str, Any] = {
        "run_name": "trained_deepseek",
        "run_id": "0" * 32,
        "save_dir": "trained_deepseek",
        "output_dir": "results_deepseek",
        "dsft_version": "0.1.0",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "config": settings,
        "origins": dict.fromkeys(settings, "default"),
        "techniques": {"QLoRA": "NF4 4-bit weights", "packing": "off"},
        "notices": [],
        "model": {
            "name": settings["model_name"],
            "revision": "0123abc",
            "family": "llama",
            "num_parameters": 6_900_420_608,
            "num_trainable_parameters": 159_907_840,
            "quantization": "NF4, double quantization",
        },
        "tokenizer_fingerprint": "f" * 16,
        "template": "instruction",
        "data": {"num_rows": 1210, "num_train_samples": 1176, "num_validation_samples": 24},
        "num_steps": 40,
        "num_epochs": 3.0,
        "first_step": 0,
        "duration_s": 754.2,
        "train_tok_per_s": 16_384.0,
        "train_target_tok_per_s": 8_000.0,
        "step_s_median": 1.0,
        "first_loss": losses[0][1],
        "final_loss": losses[-1][1],
        "losses": losses,
        "validation_losses": [(0, 1.6), (20, 0.7), (40, 0.8)],
        "best_step": 20,
        "best_validation_loss": 0.7,
        "kept": "last",
        "peak_memory_allocated_bytes": 17 * GIB,
        "peak_memory_reserved_bytes": 18 * GIB,
        "peak_memory_device_bytes": 23 * GIB,
        "peak_host_memory_bytes": 3 * GIB,
        "device": "NVIDIA GeForce RTX 4090",
        "memory_total_bytes": 24 * GIB,
        "example_prompt": "### Instruction:\nReverse a list.\n\n### Response:\n",
    }
    return TrainResult(**(fields | changes))


def make_cpu_result(config: dict[str, Any] | None = None, **changes: Any) -> TrainResult:
    """Return the result of a run on a CPU."""
    no_gpu = dict.fromkeys(
        ("peak_memory_allocated_bytes", "peak_memory_reserved_bytes", "peak_memory_device_bytes"), None
    )
    return make_result(config, **({**no_gpu, "device": "CPU (2 threads)"} | changes))
