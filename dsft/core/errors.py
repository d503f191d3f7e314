"""Every error dsft raises on purpose, and the exit code each one ends the process with.

Tree:
    DsftError                    1  failure
      InputError                 2  wrong input or configuration
        ConfigError                 a setting is unknown or out of range
        DataError                   the data set can't be read or used
        TokenizerError              the tokenizer does not reproduce known text
        ModelError                  the model can't be read or used
        OutputFolderError           an output folder holds something it may not hold
        UnreachableHubError         the model hub did not answer
      DoesNotFitError            3  needs more memory than there is
      NoGpuError                 5  no usable GPU or driver where one is needed
      NonFiniteLossError         1  the loss or a gradient became NaN or infinite
      CheckpointError            1  a checkpoint is damaged
      WriteError                 1  what a command is to leave can't be written
      MergeError                 1  an adapter is damaged, or a merged model is not what base and adapter compute
    RunInterrupted              75  stopped by a signal with a resumable checkpoint saved
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of every dsft command (documented in docs/exit-codes.md)."""

    DONE = 0
    FAILURE = 1
    WRONG_INPUT = 2
    DOES_NOT_FIT = 3
    ALERT = 4
    NO_GPU = 5
    INTERRUPTED_RESUMABLE = 75
    INTERRUPTED = 130
    TERMINATED = 143


class DsftError(Exception):
    """An expected failure: what was found and where, and what to do about it.

    Args:
        found: One sentence: what was found, and where (file, line, field).
        fix: One sentence: what the user can do. Empty where nothing can be said.
    """

    exit_code: ExitCode = ExitCode.FAILURE

    def __init__(self, found: str, fix: str = "") -> None:
        super().__init__(f"{found} {fix}".strip())
        self.found = found
        self.fix = fix


class InputError(DsftError):
    """The user's input is wrong; nothing was written."""

    exit_code = ExitCode.WRONG_INPUT


class ConfigError(InputError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(InputError):
    """The data set can't be read, recognised or used."""


class TokenizerError(InputError):
    """The tokenizer changes text it must reproduce, so training on it would ruin the model."""


class ModelError(InputError):
    """The model folder or id can't be read, or the model can't be trained by dsft."""


class OutputFolderError(InputError):
    """An output folder already holds a run, or something that is not one."""


class UnreachableHubError(InputError):
    """The model hub did not answer, and what was asked for is not in the local cache."""


class DoesNotFitError(DsftError):
    """The run needs more memory than the device has."""

    exit_code = ExitCode.DOES_NOT_FIT


class NoGpuError(DsftError):
    """A GPU or its driver is needed and can't be used."""

    exit_code = ExitCode.NO_GPU


class NonFiniteLossError(DsftError):
    """The loss or a gradient is NaN or infinite; the optimizer was not stepped with it."""


class CheckpointError(DsftError):
    """A checkpoint is damaged, or belongs to another configuration."""


class WriteError(DsftError):
    """What a command is to leave can't be written; nothing of it is left."""


class MergeError(DsftError):
    """An adapter holds numbers that are not finite, or the merged model does not compute what base and adapter do."""


CPU_ALLOCATOR = "DefaultCPUAllocator: "
"""What torch's RuntimeError says where the host's memory is too small; for a GPU's it has a class."""


_GPU_WORDS = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""What the driver (behind expandable segments) and libraries beside PyTorch's allocator say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the host or of a GPU is too small; loads no torch for it."""
    is_cpu_allocator = isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    return isinstance(error, MemoryError) or is_cpu_allocator or is_gpu_out_of_memory(error)


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU's memory is too small."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GPU_WORDS)


def take_first_line(error: BaseException) -> str:
    """Return what an error of a library says, without the pages that may follow."""
    return str(error).strip().partition("\n")[0]


def describe_os_error(error: OSError) -> str:
    """Return what the system says of a failure, without the path that a sentence around it names anyway."""
    return error.strerror or str(error)


class RunInterrupted(Exception):
    """A signal ended the run after a resumable checkpoint was saved.

    Args:
        signal_name: "SIGINT" or "SIGTERM".
        checkpoint: Path of the checkpoint that was saved.
        step: Optimizer steps done.
    """

    exit_code = ExitCode.INTERRUPTED_RESUMABLE

    def __init__(self, signal_name: str, checkpoint: str, step: int) -> None:
        super().__init__(f"stopped by {signal_name} after step {step}; checkpoint: {checkpoint}")
        self.signal_name = signal_name
        self.checkpoint = checkpoint
        self.step = step
