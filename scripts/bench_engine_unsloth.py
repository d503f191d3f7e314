"""Unsloth's side of `bench_engine.py`, as its users run it: FastLanguageModel and TRL's SFTTrainer, with a clock.

Runs in an environment of Unsloth's own, without dsft. Full sequences are dense batches of random token ids; real
samples are texts that the trainer tokenizes, laid out without padding or packed, whichever Unsloth decides or is asked.
"""

import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench_engine_sides import Job, main

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("unsloth", "unsloth_zoo", "trl", "transformers", "peft", "bitsandbytes", "xformers", "torch", "triton")
MOST_TOKENS_OFF = 0.02
"""By which share a trainer's own tokens may differ from dsft's for the same texts."""


def run_unsloth(job: Job) -> dict[str, Any]:
    """Load, attach LoRA, train, and return every step's time."""
    began_s = time.time()
    from unsloth import FastLanguageModel  # isort: skip - it has to come before transformers, trl and peft

    import torch

    hold_to_card(job, num_trained=0)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=job["model"],
        max_seq_length=job["length"],
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_exact_model_name=True,
    )
    checkpointing = {"true": True, "false": False}.get(job["checkpointing"], job["checkpointing"])
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["rank"],
        target_modules=TARGETS,
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=job["seed"],
        max_seq_length=job["length"],
    )
    hold_to_card(job, num_trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trainer, facts = make_trainer(job, model, folder)
        counts = count_tokens(trainer.data_collator)
        times = add_clock(trainer, job["num_warmup_steps"])
        torch.cuda.reset_peak_memory_stats()
        outcome = trainer.train()
    num_passes = job["effective_batch"] // job["micro_batch"]
    steps = [
        {"step_s": step_s, "num_tokens": sum(counts[index * num_passes : (index + 1) * num_passes])}
        for index, step_s in enumerate(times["steps"])
    ]
    num_warmup_steps = job["num_warmup_steps"]
    return facts | {
        "versions": find_versions(),
        "ready_s": times["begin"][0] - began_s,
        "first_step_s": times["first"][0],
        "last_step_s": times["last"][-1],
        "warmup_steps": steps[:num_warmup_steps],
        "steps": steps[num_warmup_steps:],
        "loss": outcome.training_loss,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def hold_to_card(job: Job, num_trained: int) -> None:
    """Hold PyTorch's allocator to a card's size less the CUDA context and the optimizer's paged state."""
    import pynvml
    import torch

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    pynvml.nvmlInit()
    used = int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    if num_trained == 0:
        job["context_bytes"] = used - torch.cuda.memory_reserved() - job["used_before_bytes"] + job["kernels_bytes"]
    limit_bytes = job["budget_bytes"] - job["context_bytes"] - 8 * num_trained
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / torch.cuda.get_device_properties(0).total_memory))


def make_trainer(job: Job, model: Any, folder: str) -> tuple[Any, dict[str, Any]]:
    """Return the trainer, and what is to be known of its data."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(job["model"])
    dataset, facts = make_dataset(job, model, tokenizer)
    # Left unset, padding_free is Unsloth's own choice; sequences that are all full have no padding to be freed of.
    layout = {"full": {"padding_free": False}, "real": {}, "packed": {"packing": True}}[job["kind"]]
    arguments = SFTConfig(
        output_dir=folder,
        max_length=job["length"],
        dataset_text_field="text",
        dataset_num_proc=1,
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["effective_batch"] // job["micro_batch"],
        max_steps=job["num_warmup_steps"] + job["num_steps"],
        train_sampling_strategy="sequential" if job["kind"] == "real" else "random",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=job["weight_decay"],
        max_grad_norm=job["max_grad_norm"],
        optim="paged_adamw_32bit" if job["optimizer"] == "paged_adamw_32bit" else "adamw_torch_fused",
        bf16=True,
        seed=job["seed"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **layout,
    )
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=arguments)
    facts |= {
        "padding_free": bool(trainer.args.padding_free),
        "packing": bool(trainer.args.packing),
        "collator": type(trainer.data_collator).__name__,
        "num_sequences": len(trainer.train_dataset),
        "checkpointing": job["checkpointing"],
        "trained_dtype": str(next(weight.dtype for weight in model.parameters() if weight.requires_grad)),
    }
    if job["kind"] == "packed" and not facts["packing"]:
        raise ValueError("Unsloth turned packing off")
    if job["kind"] != "full":
        check_tokens(trainer.train_dataset, facts)
    return trainer, facts


def load_tokenizer(folder: str) -> Any:
    """Return the tokenizer exactly as its tokenizer.json says: some versions of transformers make another of it."""
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder) / "tokenizer.json"),
        bos_token=settings["bos_token"],
        eos_token=settings["eos_token"],
        pad_token=settings["pad_token"],
        padding_side="right",
    )


def make_dataset(job: Job, model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Return random full sequences, or texts, and how many tokens dsft makes of those."""
    import numpy as np
    from datasets import Dataset

    if job["kind"] == "full":
        num_sequences = (job["num_warmup_steps"] + job["num_steps"]) * job["effective_batch"]
        ids = [
            np.random.default_rng([job["seed"], index]).integers(0, model.config.vocab_size, job["length"]).tolist()
            for index in range(num_sequences)
        ]
        return Dataset.from_dict({"input_ids": ids}), {}
    with Path(job["texts"]).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return Dataset.from_dict({"text": [row["text"] for row in rows]}), {
        "dsft_tokens": sum(row["num_tokens"] for row in rows)
    }


def check_tokens(dataset: Any, facts: dict[str, Any]) -> None:
    """Refuse a data set whose tokens are not those that dsft trains on."""
    facts["own_tokens"] = sum(len(ids) for ids in dataset["input_ids"])
    off = facts["own_tokens"] / facts["dsft_tokens"] - 1
    if abs(off) > MOST_TOKENS_OFF:
        raise ValueError(f"the trainer made {facts['own_tokens']:,} tokens of {facts['dsft_tokens']:,}")


def count_tokens(collator: Any) -> list[int]:
    """Return a list to which the collator adds the tokens of each micro-batch, in order, padding left out."""
    counts: list[int] = []
    collate = collator.torch_call

    def collate_and_count(examples: Any) -> Any:
        counts.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    collator.torch_call = collate_and_count
    return counts


def add_clock(trainer: Any, num_warmup_steps: int) -> dict[str, list[float]]:
    """Return the times of a training run: "steps" in seconds, and when it and its measured steps began and ended."""
    import torch
    from transformers import TrainerCallback

    times: dict[str, list[float]] = {"begin": [], "first": [], "last": [], "steps": []}

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Waits for the GPU after each step."""

        before_s = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            """Begin with the first step: those after it begin where the one before ended."""
            if not times["begin"]:
                times["begin"].append(time.time())
                torch.cuda.synchronize()
                self.before_s = time.perf_counter()
            if len(times["steps"]) == num_warmup_steps:
                times["first"].append(time.time())

        def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            """End a step when its kernels have ended."""
            torch.cuda.synchronize()
            now_s = time.perf_counter()
            times["steps"].append(now_s - self.before_s)
            times["last"].append(time.time())
            self.before_s = now_s

    trainer.add_callback(Clock())
    return times


def find_versions() -> dict[str, str]:
    """Return the versions of the packages that take part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    side: Callable[[Job], dict[str, Any]] = run_unsloth
    main(side)
