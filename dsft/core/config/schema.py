"""The training configuration: every setting of `dsft train`, its default, its limits and what it means.

The docstring under a field is its help text on the command line and in the documentation; nothing else repeats it.
"""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

TemplateChoice = Literal["auto", "instruction", "deepseek", "chat", "fim", "text"]

DEFAULT_DATASET = "sahil2801/CodeAlpaca-20k"
"""The hub data set the seed's epoch times imply (about 3.3 M tokens)."""

DEFAULT_DATASET_REVISION = "152bb5e9a29651266b018106053980070a0521a1"
"""Commit of the default data set: 20,022 rows in code_alpaca_20k.json."""


def _default_dataset_revision(values: dict[str, Any]) -> str | None:
    # A commit belongs to one data set: it must not follow when only `dataset` is set to something else.
    return DEFAULT_DATASET_REVISION if values.get("dataset") == DEFAULT_DATASET else None


def _default_bad_rows(values: dict[str, Any]) -> Literal["error", "skip"]:
    # The default data set is known to hold a few rows with an empty response (6 of 20,022).
    return "skip" if values.get("dataset") == DEFAULT_DATASET else "error"


class TrainConfig(BaseModel):
    """What `dsft train` does: the recipe (what is learned) and how this machine runs it.

    Keys of preset and `--config` files are the field names; flags are the same names with dashes or underscores.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    # Model and data
    model_name: Annotated[str, Field(min_length=1)] = "deepseek-ai/deepseek-coder-6.7b-base"
    """Base model: hub id, local folder, or builtin:tiny/model."""
    model_revision: str | None = None
    """Hub revision (branch, tag or commit) of the base model."""
    dataset: Annotated[str, Field(min_length=1)] = DEFAULT_DATASET
    """Data set: JSON, JSONL, CSV or Parquet file, folder of source files, or hub id."""
    dataset_revision: str | None = Field(default_factory=_default_dataset_revision)
    """Hub revision (branch, tag or commit) of the data set; the default data set is pinned to a commit."""
    dataset_split: Annotated[str, Field(min_length=1)] = "train"
    """Split of a hub data set to train on."""
    bad_rows: Literal["error", "skip"] = Field(default_factory=_default_bad_rows)
    """What happens to rows that can't be used (an empty response, a wrong type): error refuses the run and names their
    places, skip leaves them out and counts them; the default is error, and skip for the default data set."""
    template: TemplateChoice = "auto"
    """Prompt template: instruction, deepseek, chat, fim or text; auto picks by the data's layout."""
    loss_on: Literal["response", "all"] = "response"
    """Which tokens carry loss: the response only, or prompt and response."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence in tokens."""
    over_length: Literal["drop", "truncate"] = "drop"
    """What happens to longer samples: left out, or cut with their end token kept."""
    max_samples: PositiveInt | None = None
    """Use only the first N usable rows."""
    packing: bool = False
    """Pack several samples into each sequence; attention never crosses a sample."""
    validation_split: Fraction = 0.02
    """Share of rows held out for the validation loss; rows with the same prompt stay together."""
    validation_dataset: str | None = None
    """Data set for the validation loss, instead of a share of the training data."""

    # LoRA
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 64
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 128
    """LoRA alpha; the update is scaled by alpha / rank. Twice the rank where only a rank is given."""
    lora_dropout: Fraction = 0.0
    """Dropout on the input of the LoRA branch."""

    # Optimization
    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training data."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever the epochs say."""
    per_device_train_batch_size: PositiveInt = 1
    """Samples in one micro-batch."""
    gradient_accumulation_steps: PositiveInt = 16
    """Micro-batches in one optimizer step; micro-batch times this is the effective batch."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps over which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    """Gradients are scaled down to this norm (QLoRA, arXiv:2305.14314, appendix B.2)."""
    optimizer: Literal["paged_adamw_32bit", "adamw"] = "paged_adamw_32bit"
    """AdamW with state that can page to host memory, or PyTorch's own."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of LoRA weights, data order and splits."""

    # Execution: speed and memory, never the result
    plan: Literal["auto", "off"] = "auto"
    """How an optimizer step is split and what is recomputed: auto chooses the fastest way that fits the memory (on a
    CPU: as off), off takes micro-batch, accumulation and gradient checkpointing as they are written."""
    vram: Annotated[float, Field(gt=0, le=4096)] | None = None
    """Plan for a GPU of this many GiB and hold the run to it; without it, for the free memory of the GPU."""
    micro_batch: PositiveInt | None = None
    """Sequences in one pass, whatever the plan would choose; the effective batch stays."""
    recompute_blocks: Annotated[int, Field(ge=0)] | None = None
    """Blocks that recompute their activations, whatever the plan would choose."""
    page_optimizer: Literal["auto", "yes", "no"] = "auto"
    """Whether the state of paged_adamw_32bit may page to host memory; auto lets the plan decide."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: of as many blocks as the plan says, with --plan off of all."""
    engine: Literal["auto", "off"] = "auto"
    """How blocks are computed: auto takes dsft's own engine where it computes the model exactly, off transformers' and
    PEFT's modules."""
    use_flash_attention: bool = False
    """Demand a flash-attention kernel: the flash-attn package or PyTorch's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute type; auto is bf16 where the GPU has it, else fp16 with loss scaling, and fp32 on a CPU."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that prepare batches; 0 prepares them in the training process."""

    # Files
    output_dir: Annotated[str, Field(min_length=1)] = "./results_deepseek"
    """Folder of checkpoints and logs."""
    save_dir: Annotated[str, Field(min_length=1)] = "./trained_deepseek"
    """Folder of the final adapter."""
    save_steps: PositiveInt = 250
    """Save a checkpoint (and measure validation loss) every N optimizer steps."""
    save_total_limit: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep: Literal["last", "best"] = "last"
    """Which adapter becomes the final one: of the last step, or of the lowest validation loss."""

    @property
    def effective_batch_size(self) -> int:
        """Samples (with packing: packed sequences) in one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @field_validator("output_dir", "save_dir")
    @classmethod
    def _expand_home(cls, folder: str) -> str:
        # A shell does this for flags it can see, and transformers for its own folder; a run must not be split by it.
        return os.path.expanduser(folder)  # noqa: PTH111 - Path's raises for unknown users

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.keep == "best" and self.validation_split == 0 and self.validation_dataset is None:
            raise PydanticCustomError(
                "contradiction",
                "best needs a validation loss; set validation_split above 0 or a validation_dataset",
                {"setting": "keep"},
            )
        return self


SECTION_STARTS = {
    "model_name": "Model and data",
    "lora_r": "LoRA",
    "epochs": "Optimization",
    "plan": "Execution",
    "output_dir": "Files",
}
"""First field of each section of `TrainConfig`, and the section's title; a section ends where the next one starts."""

EXECUTION_FIELDS = frozenset(
    {
        "plan",
        "vram",
        "micro_batch",
        "recompute_blocks",
        "page_optimizer",
        "gradient_checkpointing",
        "engine",
        "use_flash_attention",
        "device",
        "precision",
        "dataloader_num_workers",
    }
)
"""Settings that decide speed and memory only."""

FILE_FIELDS = frozenset({"output_dir", "save_dir", "save_steps", "save_total_limit", "keep"})
"""Settings that decide where and when files are written."""


def recipe(config: TrainConfig) -> dict[str, object]:
    """Return the settings that decide what is learned; a resumed run must have the same.

    Micro-batch and accumulation count by their product alone, the effective batch.
    """
    values = config.model_dump(exclude=set(EXECUTION_FIELDS | FILE_FIELDS))
    del values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    return values | {"effective_batch_size": config.effective_batch_size}
