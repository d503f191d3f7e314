"""Everything a row decides and reads before a model loads."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsft.bench.data import RowData, prepare_row_data
from dsft.bench.result import PlanFigures
from dsft.bench.rows import BenchRow
from dsft.core.config.schema import TrainConfig
from dsft.core.memory.model_shape import ModelShape, read_model_shape
from dsft.core.models.attention import AttentionKernel, choose_attention
from dsft.core.models.device import Device, Precision, resolve_device, resolve_precision
from dsft.core.models.load import check_trainable
from dsft.core.models.source import ModelSource, find_model
from dsft.train.arguments import OptimizerChoice, choose_optimizer, count_steps
from dsft.train.planning import CardView, RunPlan, plan_run
from dsft.train.rehearsal import StepOrder
from dsft.train.setup import find_engine_obstacle


@dataclass(frozen=True)
class RowSetup:
    """What a row will use.

    Attributes:
        row: The row.
        device: Where it runs.
        precision: Compute type.
        attention: Attention kernel.
        optimizer: The optimizer.
        source: The base model.
        shape: Its sizes.
        data: What is trained on.
        order: The sequences of every step of the whole run that is measured in part.
        run_plan: How a step runs.
    """

    row: BenchRow
    device: Device
    precision: Precision
    attention: AttentionKernel
    optimizer: OptimizerChoice
    source: ModelSource
    shape: ModelShape
    data: RowData
    order: StepOrder
    run_plan: RunPlan
    engine_obstacle: str | None

    @property
    def config(self) -> TrainConfig:
        """The configuration."""
        return self.row.config

    @property
    def is_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.kind == "cuda"

    @property
    def torch_device(self) -> torch.device:
        """The device as PyTorch names it."""
        return torch.device("cuda", 0) if self.is_gpu else torch.device("cpu")

    @property
    def model_key(self) -> tuple[str, ...]:
        """What rows must have in common to share a loaded model."""
        location = (self.source.location, str(self.source.commit or self.source.revision))
        return (*location, self.device.kind, self.precision, self.attention.name)

    @property
    def plan_figures(self) -> PlanFigures:
        """The plan for the record."""
        plan = self.run_plan.plan
        return PlanFigures(
            micro_batch_size=plan.micro_batch_size,
            micro_batch_tokens=plan.micro_batch_tokens,
            splits_by_tokens=plan.splits_by_tokens,
            num_recomputed=plan.num_recomputed,
            num_blocks=self.run_plan.num_blocks,
            pages_optimizer=plan.pages_optimizer,
            is_chosen=not self.run_plan.is_literal,
        )


def prepare_row(
    row: BenchRow, view: CardView | None, num_steps: int, *, use_random: bool, on_rows: Callable[[int], None]
) -> RowSetup:
    """Decide device, kernels and plan of a row, find its model and make its data.

    Args:
        row: The row.
        view: The GPU; None where there is none.
        num_steps: Optimizer steps that will run.
        use_random: Take random samples whatever data the row names.
        on_rows: Called now and then with the number of rows tokenized.

    Raises:
        DsftError: Whatever is wrong with the row, or that it does not fit.
    """
    config = row.config
    source = find_model(config.model_name, config.model_revision)
    check_trainable(source, config.max_length)
    shape = read_model_shape(source.model_config, source.name)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    demand = row.resolved.origins["use_flash_attention"] if config.use_flash_attention else None
    attention = choose_attention(demand, device, precision)
    data = prepare_row_data(row, source, num_steps, use_random=use_random, on_rows=on_rows)
    num_run_steps = num_steps if data.is_random else count_steps(config, len(data.sequences))
    order = StepOrder(data.sequences.lengths, config.effective_batch_size, config.seed, num_run_steps)
    obstacle = find_engine_obstacle(config, source, device, precision, on_notice=lambda _text: None)
    run_plan = plan_run(
        config,
        view if device.kind == "cuda" else None,
        precision=precision,
        attention=attention,
        shape=shape,
        workload=order.workload(data.longest_validation),
        uses_engine=obstacle is None,
    )
    return RowSetup(
        row=row,
        device=device,
        precision=precision,
        attention=attention,
        optimizer=choose_optimizer(config, device, shape.num_lora_weights(config.lora_r)),
        source=source,
        shape=shape,
        data=data,
        order=order,
        run_plan=run_plan,
        engine_obstacle=obstacle,
    )
