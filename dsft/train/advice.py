"""The cheapest change that would make a run faster, judged from what the run measured; runs nothing itself."""

from dataclasses import dataclass
from typing import Any, Self

from dsft.core.units import format_count, format_gib
from dsft.train.events import TrainResult

ENOUGH_TOKENS_GPU = 8192
"""Tokens in a micro-batch from which a GPU is busy: 6.7B on an H100 gains 7 % from 4 x 1024 to 8 x 1024 tokens."""

ENOUGH_TOKENS_CPU = 2048
"""The same on a CPU, where each micro-batch dequantizes every weight anew: from 150 to 1,200 tokens the time of a
token falls to a fifth."""

_USABLE_SHARE = 0.9
"""Of the free memory; the rest is lost to fragmentation."""

_MAX_DATA_WAIT = 0.1
_MIN_STEPS_PACKED = 100


@dataclass(frozen=True)
class _Run:
    """The figures of a result the rules need.

    Attributes:
        config: The configuration as run.
        is_gpu: Whether it ran on a GPU.
        is_planned: Whether the plan chose the micro-batch.
        micro_batch_size: Sequences in a micro-batch.
        accumulation: Micro-batches in a step.
        step_tokens: Real tokens in a typical step.
        fixed_bytes: A lower bound of what does not grow with the micro-batch.
        used_bytes: Peak memory of the device (CPU: of the process).
        total_bytes: Memory there is.
    """

    config: dict[str, Any]
    is_gpu: bool
    is_planned: bool
    micro_batch_size: int
    accumulation: int
    step_tokens: float
    fixed_bytes: float
    used_bytes: int | None
    total_bytes: int | None

    @classmethod
    def of(cls, result: TrainResult) -> Self:
        config: dict[str, Any] = result.config
        model: dict[str, Any] = result.model
        num_trainable = model["num_trainable_parameters"]
        is_gpu = result.peak_memory_reserved_bytes is not None
        return cls(
            config=config,
            is_gpu=is_gpu,
            is_planned=bool(result.plan.get("splits_by_tokens")),
            micro_batch_size=config["per_device_train_batch_size"],
            accumulation=config["gradient_accumulation_steps"],
            step_tokens=result.train_tok_per_s * result.step_s_median,
            # Frozen weights take at least half a byte, trained ones 4 and their gradients 4; optimizer state may page.
            fixed_bytes=(model["num_parameters"] - num_trainable) / 2 + num_trainable * 8,
            used_bytes=(result.peak_memory_device_bytes or result.peak_memory_reserved_bytes)
            if is_gpu
            else result.peak_host_memory_bytes,
            total_bytes=result.memory_total_bytes,
        )


def suggest_speedup(result: TrainResult) -> str | None:
    """Return the cheapest change that would make the run faster, as one sentence, or None if there is none to see.

    Changes that leave the result as it is come first. There is no rule for `--use-flash-attention`: wherever a flash
    kernel can run, dsft takes PyTorch's own without being asked.
    """
    run = _Run.of(result)
    if run.step_tokens <= 0:
        return None
    return _micro_batch(run) or _workers(run, result) or _precision(run) or _packing(run, result.num_steps)


def _micro_batch(run: _Run) -> str | None:
    if run.is_planned or not run.used_bytes or not run.total_bytes:
        return None
    tokens = run.step_tokens / run.accumulation
    if run.is_gpu:
        return _planned_micro_batch(run, tokens)
    enough = ENOUGH_TOKENS_CPU / tokens
    growing_bytes = max(run.used_bytes - run.fixed_bytes, 1)
    fitting = 1 + _USABLE_SHARE * (run.total_bytes - run.used_bytes) / growing_bytes
    divisors = [times for times in range(1, run.accumulation + 1) if run.accumulation % times == 0]
    factor = max(times for times in divisors if times <= max(1.0, min(enough, fitting)))
    if factor == 1:
        return None
    micro_batch_size, accumulation = run.micro_batch_size * factor, run.accumulation // factor
    return (
        f"A micro-batch held about {format_count(tokens)} tokens and the run used {format_gib(run.used_bytes)} of "
        f"{format_gib(run.total_bytes)}: --per-device-train-batch-size {micro_batch_size} "
        f"--gradient-accumulation-steps {accumulation} trains the same batches in fewer, larger passes."
    )


def _planned_micro_batch(run: _Run, tokens: float) -> str | None:
    if run.accumulation == 1 or 2 * tokens > ENOUGH_TOKENS_GPU or not run.total_bytes or not run.used_bytes:
        return None
    if run.used_bytes > _USABLE_SHARE * run.total_bytes:
        return None
    return (
        f"A micro-batch held about {format_count(tokens)} tokens and the run used {format_gib(run.used_bytes)} of "
        f"{format_gib(run.total_bytes)}: --plan auto trains the same batches in larger passes, as large as fit."
    )


def _workers(run: _Run, result: TrainResult) -> str | None:
    wait_s = result.data_wait_s or 0.0
    if run.config["dataloader_num_workers"] > 0 or wait_s <= _MAX_DATA_WAIT * result.duration_s:
        return None
    share = wait_s / result.duration_s
    return (
        f"Training waited {share * 100:.0f} % of the time for data: --dataloader-num-workers 2 prepares it meanwhile."
    )


def _precision(run: _Run) -> str | None:
    if not run.is_gpu or run.config["precision"] != "fp32":
        return None
    return "The GPU computed in 32 bits: --precision auto takes 16, with a flash kernel for attention."


def _packing(run: _Run, num_steps: int) -> str | None:
    max_length: int = run.config["max_length"]
    fill = run.step_tokens / (run.micro_batch_size * run.accumulation * max_length)
    is_worth_it = run.is_gpu and fill <= 0.5 and run.step_tokens < ENOUGH_TOKENS_GPU
    if run.config["packing"] or not is_worth_it or num_steps * fill < _MIN_STEPS_PACKED:
        return None
    return (
        f"Samples average {format_count(fill * max_length)} of {format_count(max_length)} tokens: --packing puts "
        f"about {1 / fill:.0f} in each sequence, for larger and fewer steps (the effective batch grows with them)."
    )
