"""What an exception means to the user: message, hint and exit code; decides nothing and prints nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

import typer

from dsft.cli.noise import is_debugging
from dsft.core.errors import CPU_ALLOCATOR, DsftError, ExitCode, RunInterrupted, is_out_of_memory

_UsageError = typer.BadParameter.__base__ or typer.BadParameter
"""The base of every error in how a command line is written; typer names it only through this class."""

_HUB_PACKAGES = frozenset({"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})

_HUB_WAYS_ON = (
    "Check the name and the connection, or go on without the hub: `--dataset FILE`, `--model-name DIR`, "
    "or `--preset tiny`, which needs neither."
)

_MEMORY_WAYS_ON = (
    "Close other programs that use the memory, or need less of it: to train, a smaller --max-length or --lora-r; "
    "to infer, a shorter prompt or --load-in-4bit; to merge, --device cpu."
)


class Terminated(BaseException):
    """SIGTERM or SIGHUP came while no run was there to save a checkpoint.

    Attributes:
        signal_name: Which of them.
    """

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


@dataclass(frozen=True)
class Report:
    """What the user is told about an exception.

    Attributes:
        kind: Class name of the error, for programs.
        found: What was found, and where.
        fix: What to do about it, or empty.
        exit_code: The process's exit code.
        label: First word of the message.
    """

    kind: str
    found: str
    fix: str
    exit_code: ExitCode
    label: str = "error"


def report(error: BaseException) -> Report:
    """Return what the user is told about an exception, expected or not."""
    if isinstance(error, DsftError):
        return Report(type(error).__name__, error.found, error.fix, error.exit_code)
    for describe in (_report_stop, _report_usage, _report_hub, _report_memory, _report_file):
        found = describe(error)
        if found is not None:
            return found
    message = " ".join(str(error).split())
    return Report(
        kind="UnexpectedError",
        found=f"unexpected error (a bug in dsft): {type(error).__name__}{': ' if message else ''}{message}",
        fix="" if is_debugging() else "Set DSFT_DEBUG=1 to see where it happened.",
        exit_code=ExitCode.FAILURE,
    )


def _report_stop(error: BaseException) -> Report | None:
    if isinstance(error, RunInterrupted):
        found = f"{error.signal_name} after step {error.step}; a checkpoint is saved in {error.checkpoint}."
        fix = "The same command with --resume (and without --overwrite) goes on from there."
        return Report("RunInterrupted", found, fix, error.exit_code, label="stopped")
    fix = " ".join(getattr(error, "__notes__", []))
    if isinstance(error, KeyboardInterrupt):
        return Report("Interrupted", "SIGINT; nothing more was saved.", fix, ExitCode.INTERRUPTED, label="stopped")
    if isinstance(error, Terminated):
        found = f"{error.signal_name}; nothing more was saved."
        return Report("Terminated", found, fix, ExitCode.TERMINATED, label="stopped")
    return None


def _report_usage(error: BaseException) -> Report | None:
    if not isinstance(error, _UsageError):
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dsft COMMAND"
    fix = f"`{command} --help` shows what it takes."
    option = getattr(error, "option_name", None)
    possibilities = getattr(error, "possibilities", None)
    if option is not None and possibilities is not None:
        found = f"{command} has no option {option}."
        fix = f"Did you mean {possibilities[0]}? {fix}" if possibilities else fix
    else:
        message: str = error.format_message()  # type: ignore[attr-defined]  # of typer's exceptions
        found = message.replace(": Value error, ", ": ")
        if "unexpected extra argument" in message and command.endswith(" infer"):
            fix = f'A prompt of several words needs quotes: `{command} "PROMPT"`. {fix}'
    return Report("UsageError", found, fix, ExitCode.WRONG_INPUT)


def _report_hub(error: BaseException) -> Report | None:
    """A hub error that reached the top: core raises UnreachableHubError itself wherever it asks the hub."""
    for cause in _causes(error):
        if type(cause).__module__.partition(".")[0] in _HUB_PACKAGES:
            first_line = str(cause).strip().partition("\n")[0] or type(cause).__name__
            return Report(
                "UnreachableHubError", f"the model hub gave nothing: {first_line}", _HUB_WAYS_ON, ExitCode.WRONG_INPUT
            )
    return None


def _report_memory(error: BaseException) -> Report | None:
    if not is_out_of_memory(error):
        return None
    first_line = str(error).strip().partition("\n")[0]
    details = first_line.rpartition(CPU_ALLOCATOR)[2]
    found = f"out of memory{': ' if details else ''}{details}"
    return Report("DoesNotFitError", found, _MEMORY_WAYS_ON, ExitCode.DOES_NOT_FIT)


def _report_file(error: BaseException) -> Report | None:
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return Report("FileError", f"{place}{error.strerror}.", "Check path, permissions and free space.", ExitCode.FAILURE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
