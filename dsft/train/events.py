"""What a training run tells while it goes on; views draw these, `--json` prints them."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Notice:
    """One sentence the user should know: an announced substitute, a choice made by hardware, a skipped file."""

    text: str
    level: str = "info"  # info | warning


@dataclass(frozen=True)
class Phase:
    """Work before the first step has begun: e.g. "load tokenizer", "read data", "load model"."""

    name: str


@dataclass(frozen=True)
class PrepareProgress:
    """Rows of the data set tokenized so far."""

    num_rows: int


@dataclass(frozen=True)
class RunStarted:
    """The first step is about to begin."""

    run_name: str
    model_name: str
    device: str
    precision: str
    attention: str
    optimizer: str
    num_steps: int
    first_step: int
    num_epochs: float
    effective_batch_size: int
    micro_batch_size: int
    num_train_samples: int
    num_validation_samples: int
    num_trainable_parameters: int
    num_parameters: int
    micro_batch_tokens: int | None = None
    """Most tokens in a micro-batch; None where it is counted in sequences alone."""
    num_recomputed_blocks: int = 0
    num_blocks: int = 0
    predicted_memory_bytes: int | None = None
    """Predicted peak of the whole device; None on a CPU."""
    validates_first: bool = False
    """Whether a validation pass comes before the first step."""


@dataclass(frozen=True)
class StepDone:
    """One optimizer step is done."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    """Mean cross-entropy over the target tokens of the effective batch, nats."""
    grad_norm: float
    learning_rate: float
    num_tokens: int
    """Real tokens of the step (padding excluded)."""
    num_target_tokens: int
    step_s: float
    tok_per_s: float
    """Real tokens a second over the last steps."""
    eta_s: float
    memory_used_bytes: int | None = None
    """GPU memory in use on the device; None on a CPU."""
    memory_total_bytes: int | None = None
    peak_memory_bytes: int | None = None
    """The most in use on the device at the end of a step, since the plan in force; None on a CPU."""
    validates_next: bool = False
    """Whether a validation pass comes before the next step."""
    saves_next: bool = False
    """Whether a checkpoint is saved before the next step, after the validation."""


@dataclass(frozen=True)
class Validated:
    """A validation pass is done."""

    step: int
    loss: float
    """Mean cross-entropy over all validation target tokens, nats."""
    num_target_tokens: int
    is_best: bool
    duration_s: float


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint stands complete on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class InterruptRequested:
    """A signal came; the current step is finished and a checkpoint saved before the run ends."""

    signal_name: str


@dataclass(frozen=True)
class PlanChanged:
    """GPU memory ran out; the step is done again under a smaller plan."""

    step: int
    """Optimizer step, counted from 1; 0 in the rehearsal before the first."""
    plan: dict[str, object]
    failed_plan: dict[str, object]
    description: str
    reason: str
    predicted_memory_bytes: int | None = None
    """Peak of the whole device that is predicted for the smaller plan."""


@dataclass(frozen=True)
class RunEnded:
    """The last line of a run's event log, for those who follow it; a process that was killed leaves none.

    Attributes:
        outcome: finished, stopped (by a signal) or failed.
    """

    outcome: str


Event = (
    PlanChanged
    | Notice
    | Phase
    | PrepareProgress
    | RunStarted
    | StepDone
    | Validated
    | CheckpointSaved
    | InterruptRequested
)


class EventSink(Protocol):
    """Receives a run's events, in order, from the training thread."""

    def __call__(self, event: Event, /) -> None:
        """Take one event."""


@dataclass(frozen=True)
class TrainResult:
    """What `run_train` returns, and the content of `training_summary.json` (keys as the fields)."""

    run_name: str
    run_id: str
    """The same in run.json, and in every process of a resumed run."""
    save_dir: str
    output_dir: str
    dsft_version: str
    versions: dict[str, str]
    """Package name to version, and `python`, `cuda`, `driver` where there are."""
    config: dict[str, object]
    """The configuration as run, field name to value."""
    origins: dict[str, str]
    """Field name to where its value came from."""
    techniques: dict[str, str]
    """Technique to one phrase about how this run used it, e.g. "QLoRA" to "NF4, double quantization"."""
    notices: list[str]
    model: dict[str, object]
    """name, revision, fingerprint, num_parameters, num_trainable_parameters, quantization."""
    tokenizer_fingerprint: str
    template: str
    """Name of the prompt template the adapter was trained with; `infer` uses it."""
    data: dict[str, object]
    """The data report: rows, samples, tokens, dropped rows by reason."""
    num_steps: int
    num_epochs: float
    first_step: int
    """Step the process began at: 0, or the checkpoint's step in a resumed run."""
    duration_s: float
    """Wall time of training in the process that ended the run."""
    train_tok_per_s: float
    train_target_tok_per_s: float
    step_s_median: float
    first_loss: float
    """Training loss of the first step."""
    final_loss: float
    """Mean training loss of the last ten steps."""
    losses: list[tuple[int, float]]
    """(step, training loss)"""
    validation_losses: list[tuple[int, float]]
    best_step: int | None
    best_validation_loss: float | None
    kept: str
    """Which adapter was saved: last or best."""
    plan: dict[str, object] = field(default_factory=dict)
    """The execution plan the run ended with: core/memory/plan.py, ExecutionPlan."""
    predicted_memory_allocated_bytes: int | None = None
    """Peaks predicted for that plan and the largest micro-batch of the run; None on a CPU."""
    predicted_memory_reserved_bytes: int | None = None
    predicted_memory_device_bytes: int | None = None
    """What was in use before the run included."""
    peak_memory_allocated_bytes: int | None = None
    """Peak of PyTorch's allocator; None on a CPU."""
    peak_memory_reserved_bytes: int | None = None
    peak_memory_device_bytes: int | None = None
    """Peak of the whole device as NVML shows it."""
    peak_host_memory_bytes: int | None = None
    """Peak resident set of the process."""
    device: str = ""
    """The device for people, e.g. "NVIDIA GeForce RTX 4090"."""
    memory_total_bytes: int | None = None
    """Memory of that device; on a CPU the host's."""
    data_wait_s: float | None = None
    """Time the training thread waited for its batches; None if it was not measured."""
    example_prompt: str = ""
    """A short prompt as the template writes it, with the beginning-of-text token where there is one."""
    events: list[dict[str, object]] = field(default_factory=list)
    """Checkpoints, resumes and validation passes, with step and time."""
