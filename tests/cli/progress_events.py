"""A run of training as the events it tells, for tests of what is drawn of it."""

from dsft.core.units import GIB
from dsft.train.events import CheckpointSaved, Phase, RunStarted, StepDone, Validated

RUN = RunStarted(
    run_name="trained_deepseek",
    model_name="deepseek-ai/deepseek-coder-6.7b-base",
    device="NVIDIA GeForce RTX 4090",
    precision="bf16",
    attention="PyTorch variable-length flash kernel",
    optimizer="paged AdamW, 32 bit",
    num_steps=300,
    first_step=0,
    num_epochs=3.0,
    effective_batch_size=16,
    micro_batch_size=4,
    num_train_samples=19612,
    num_validation_samples=400,
    num_trainable_parameters=159_907_840,
    num_parameters=6_900_420_608,
)


def make_step(step: int, *, loss: float = 1.2345, on_gpu: bool = True, num_steps: int = 300) -> StepDone:
    return StepDone(
        step=step,
        num_steps=num_steps,
        epoch=3 * step / num_steps,
        loss=loss,
        grad_norm=0.2811,
        learning_rate=1.9e-4,
        num_tokens=2400,
        num_target_tokens=1200,
        step_s=0.98,
        tok_per_s=2331.4,
        eta_s=723.0,
        memory_used_bytes=18 * GIB + GIB // 3 if on_gpu else None,
        memory_total_bytes=24 * GIB if on_gpu else None,
    )


FULL = [
    Phase("find the model"),
    RUN,
    *(make_step(step, loss=2 - step / 100) for step in range(1, 21)),
    Validated(20, 0.95, 9000, True, 2.0),
    CheckpointSaved(20, "results_deepseek/checkpoint-20"),
    make_step(21, loss=1.7),
]
