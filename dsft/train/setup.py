"""Everything a run decides and reads before the model loads; writes nothing outside the cache."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsft.core.config.load import ResolvedConfig
from dsft.core.config.schema import TrainConfig
from dsft.core.data.packing import pack_sequences
from dsft.core.data.prepare import PreparedData, prepare_data
from dsft.core.data.sources import open_source
from dsft.core.engine.support import find_obstacle
from dsft.core.large_imports import import_bitsandbytes, large_imports, wake_cuda_driver
from dsft.core.memory.model_shape import read_model_shape
from dsft.core.models.attention import AttentionKernel, choose_attention
from dsft.core.models.device import (
    Device,
    Precision,
    choose_allocator,
    hide_gpus,
    resolve_device,
    resolve_precision,
)
from dsft.core.models.load import check_trainable
from dsft.core.models.source import ModelSource, find_model, fingerprint_weights
from dsft.core.models.tokenizer import LoadedTokenizer, load_tokenizer
from dsft.core.notices import Notify
from dsft.core.paths import cache_dir
from dsft.core.units import format_gib
from dsft.train.events import EventSink, Notice, Phase, PrepareProgress

if TYPE_CHECKING:
    from dsft.core.memory.plan import ExecutionPlan
    from dsft.core.memory.training import TrainingMemory
    from dsft.train.arguments import OptimizerChoice
    from dsft.train.batches import SequenceDataset
    from dsft.train.planning import RunPlan
    from dsft.train.rehearsal import StepOrder


@dataclass(frozen=True)
class RunSetup:
    """What a run will use."""

    config: TrainConfig
    origins: dict[str, str]
    device: Device
    precision: Precision
    attention: AttentionKernel
    optimizer: "OptimizerChoice"
    source: ModelSource
    tokenizer: LoadedTokenizer
    model_fingerprint: str
    data: PreparedData
    sequences: "SequenceDataset"
    num_steps: int
    order: "StepOrder"
    run_plan: "RunPlan"
    notices: tuple[str, ...]
    engine_obstacle: str | None

    @property
    def uses_engine(self) -> bool:
        """Whether dsft's engine computes the blocks."""
        return self.engine_obstacle is None

    @property
    def num_validation_samples(self) -> int:
        """Samples held out."""
        return len(self.data.validation) if self.data.validation is not None else 0

    def predict_memory(self, plan: "ExecutionPlan") -> "TrainingMemory | None":
        """Return the memory of the run under a plan, with the largest micro-batch it really has; None on a CPU."""
        samples = [sample for index in self.order.largest_micro_batch(plan) for sample in self.sequences[index]]
        num_tokens = sum(len(sample.token_ids) for sample in samples)
        num_targets = sum(int(sample.is_target[1:].sum()) for sample in samples)
        return self.run_plan.predict(num_tokens, num_targets, plan)

    @property
    def optimizer_description(self) -> str:
        """One phrase about the optimizer and where its state is."""
        if self.optimizer.state != "bitsandbytes" or self.run_plan.plan.pages_optimizer:
            return self.optimizer.description
        if self.run_plan.fixed.pages_optimizer is False:
            return "AdamW, 32-bit state on the device"
        return "paged AdamW, 32-bit state, on the device as long as there is room"

    @property
    def model_facts(self) -> dict[str, object]:
        """Name, revision and fingerprint of the base model, and the type it computes in."""
        return {
            "name": self.config.model_name,
            "revision": self.source.commit or self.source.revision,
            "fingerprint": self.model_fingerprint,
            "precision": self.precision,
        }

    @property
    def num_epochs(self) -> float:
        """Passes over the training data that the steps make."""
        return self.num_steps / math.ceil(len(self.sequences) / self.config.effective_batch_size)


def prepare_setup(resolved: ResolvedConfig, sink: EventSink) -> RunSetup:
    """Decide device, kernels and optimizer, find the model, check its tokenizer and tokenize the data.

    What is told from names and settings alone comes first: loading PyTorch takes seconds.

    Raises:
        DsftError: Whatever is wrong, before anything is loaded or written.
    """
    config = resolved.config
    notices: list[str] = []

    def tell(text: str | None) -> None:
        if text is not None:
            notices.append(text)
            sink(Notice(text))

    sink(Phase("find model and data"))
    source = find_model(config.model_name, config.model_revision)
    check_trainable(source, config.max_length)
    shape = read_model_shape(source.model_config, source.name)
    rows = open_source(config.dataset, split=config.dataset_split, revision=config.dataset_revision)

    sink(Phase("load PyTorch"))
    allocator_notice = choose_allocator()
    with large_imports():
        if config.device != "cpu":
            wake_cuda_driver()
        import_bitsandbytes()
        import dsft.train.fit  # noqa: F401  # what comes later, too: imports are not to be interrupted
        from dsft.train.arguments import choose_optimizer, count_steps
        from dsft.train.batches import SequenceDataset
        from dsft.train.planning import look_at_card, plan_run
        from dsft.train.rehearsal import StepOrder

    device = resolve_device(config.device)
    if device.kind == "cpu":
        hide_gpus()
        if config.vram is not None:
            tell("vram is about a GPU's memory; on a CPU memory is not planned, and settings are taken as written.")
    else:
        tell(allocator_notice)
    precision = resolve_precision(config.precision, device)
    demand = resolved.origins["use_flash_attention"] if config.use_flash_attention else None
    attention = choose_attention(demand, device, precision)
    tell(attention.notice)
    optimizer = choose_optimizer(config, device, shape.num_lora_weights(config.lora_r))
    tell(optimizer.notice)
    sink(Phase("check the tokenizer"))
    tokenizer = load_tokenizer(source)
    sink(Phase("read the data"))
    data = prepare_data(
        config,
        rows,
        tokenizer.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        cache=cache_dir(),
        on_rows=lambda num_rows: sink(PrepareProgress(num_rows)),
    )
    packs = pack_sequences(data.train.lengths, config.max_length, config.seed) if config.packing else None
    sequences = SequenceDataset(data.train, packs)
    num_steps = count_steps(config, len(sequences))
    order = StepOrder(sequences.lengths, config.effective_batch_size, config.seed, num_steps)
    sink(Phase("plan"))
    longest_validation = int(data.validation.lengths.max()) if data.validation is not None else 0
    view = look_at_card(device)  # before anything else makes a CUDA context
    obstacle = find_engine_obstacle(config, source, device, precision, tell)
    run_plan = plan_run(
        config,
        view,
        precision=precision,
        attention=attention,
        shape=shape,
        workload=order.workload(longest_validation),
        uses_engine=obstacle is None,
    )
    return RunSetup(
        config=config,
        origins=dict(resolved.origins),
        device=device,
        precision=precision,
        attention=attention,
        optimizer=optimizer,
        source=source,
        tokenizer=tokenizer,
        model_fingerprint=fingerprint_weights(source),
        data=data,
        sequences=sequences,
        num_steps=num_steps,
        order=order,
        run_plan=run_plan,
        notices=tuple(notices),
        engine_obstacle=obstacle,
    )


def find_engine_obstacle(
    config: TrainConfig, source: ModelSource, device: Device, precision: Precision, on_notice: Notify
) -> str | None:
    """Return why a run takes transformers' own blocks, as a phrase that goes on after "because"; None if it doesn't."""
    if config.engine == "off":
        return "the engine is turned off"
    return find_obstacle(
        source.model_config,
        lora_dropout=config.lora_dropout,
        device=device,
        precision=precision,
        on_notice=on_notice,
    )


def describe_blocks(engine_obstacle: str | None) -> str:
    """Return one phrase about what computes the blocks."""
    if engine_obstacle is None:
        return "dsft's engine: LoRA inside the matrix products, hand-written backward pass"
    return f"transformers' and PEFT's own modules, because {engine_obstacle}"


def describe_techniques(setup: RunSetup) -> dict[str, str]:
    """Return each technique with one phrase about how this run uses it."""
    config = setup.config
    run_plan = setup.run_plan
    plan, num_blocks = run_plan.plan, run_plan.num_blocks
    predicted = setup.predict_memory(plan)
    split = f"{plan.micro_batch_tokens} tokens"
    if not plan.splits_by_tokens:
        split = f"{plan.micro_batch_size} sequence{'s' if plan.micro_batch_size > 1 else ''}"
    num_samples, num_sequences = len(setup.data.train), len(setup.sequences)
    return {
        "QLoRA": f"NF4 4-bit weights, double quantization, {setup.precision} compute",
        "LoRA": f"rank {config.lora_r}, alpha {config.lora_alpha:g}, all linear layers of each block",
        "plan": run_plan.explain(config)
        + (f"; {format_gib(predicted.device_bytes)} predicted on the device" if predicted is not None else ""),
        "gradient checkpointing": f"{plan.num_recomputed} of {num_blocks} blocks recompute their activations"
        if plan.num_recomputed
        else "off: every block keeps its activations",
        "blocks": describe_blocks(setup.engine_obstacle),
        "attention": setup.attention.description,
        "optimizer": setup.optimizer_description,
        "gradient accumulation": f"effective batch {config.effective_batch_size} in micro-batches of up to {split}, "
        "loss normalised by the target tokens of the whole effective batch",
        "mixed precision": {
            "bf16": "bf16 compute, float32 LoRA weights",
            "fp16": "fp16 compute with loss scaling, float32 LoRA weights",
            "fp32": "off: float32 throughout",
        }[setup.precision],
        "packing": f"samples: {num_samples}, in sequences of up to {config.max_length} tokens: {num_sequences}"
        if config.packing
        else "off; micro-batches are flat, without padding",
    }
