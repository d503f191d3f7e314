"""The table of commands, and `main`, which every way of starting dsft ends in."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from dsft import __version__
from dsft.cli.help import HelpfulCommand, HelpfulGroup
from dsft.core.errors import ExitCode


@dataclass(frozen=True)
class CommandEntry:
    """A command's name, the function that is the command (imported when it is used), and its line of help."""

    name: str
    target: str
    help: str


COMMANDS = (
    CommandEntry("train", "dsft.cli.train:train", "Fine-tune a model with QLoRA."),
    CommandEntry("monitor", "dsft.cli.monitor:monitor", "Show what GPUs, host and training runs do."),
    CommandEntry("merge", "dsft.cli.merge:merge", "Merge a trained adapter into its base model."),
    CommandEntry("infer", "dsft.cli.infer:infer", "Generate text with a model or a trained adapter."),
    CommandEntry(
        "estimate-memory",
        "dsft.cli.estimate_memory:estimate_memory",
        "Predict a run's memory; --max-length auto finds the longest that fits.",
    ),
    CommandEntry("bench", "dsft.cli.bench:bench", "Measure the speed and memory of configurations."),
)


class _LazyCommand(TyperCommand):
    """Stands for a command in lists; `load` imports the real one."""

    def __init__(self, entry: CommandEntry) -> None:
        super().__init__(entry.name, help=entry.help)
        self.entry = entry

    def load(self) -> Any:
        module, _, function = self.entry.target.partition(":")
        app = typer.Typer(add_completion=False)
        app.command(self.entry.name, cls=HelpfulCommand, help=self.help)(getattr(import_module(module), function))
        return typer.main.get_command(app)


class _LazyGroup(HelpfulGroup):
    """The `dsft` command; imports only the subcommand that is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for entry in COMMANDS:
            self.add_command(_LazyCommand(entry))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, _LazyCommand) else command, rest


def main(args: Sequence[str] | None = None) -> int:
    """Run dsft.

    Args:
        args: The command line without the program's name; None takes the process's own.

    Returns:
        The exit code (docs/exit-codes.md).
    """
    from dsft.cli.noise import silence_libraries

    silence_libraries()
    # OpenMP's threads otherwise spin while they wait: with any other program on the same cores a training step on a
    # CPU was measured to take 40 times as long. It is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_closed_streams()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 is no reason to fail
    previous_handlers = _end_on_signals()
    arguments = list(sys.argv[1:] if args is None else args)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    use_json = "--json" in options  # before the parser takes the arguments out of their list
    try:
        exit_code = _run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # every way to end is mapped to an exit code here
        return _end_with(error, use_json=use_json)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return exit_code


def _open_closed_streams() -> None:
    """Give what is written to a stream that the shell has closed (`>&-`) a place to vanish in."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  # stays
            setattr(sys, name, stream)


def _run(arguments: list[str]) -> int:
    command = build()
    if "_DSFT_COMPLETE" in os.environ:
        command.main(prog_name="dsft")  # a shell asks for completions; typer answers and exits
    try:
        with command.make_context("dsft", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    return ExitCode.DONE


def build() -> HelpfulGroup:
    """Return the `dsft` command with all its subcommands, none of them imported."""
    app = typer.Typer(
        cls=_LazyGroup,
        help="Fine-tune DeepSeek-Coder with QLoRA on one consumer GPU.",
        epilog="`dsft COMMAND --help` shows a command's options. Dashes and underscores in names are the same.",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )

    @app.callback()
    def dsft(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None: ...

    command = typer.main.get_command(app)
    if not isinstance(command, HelpfulGroup):
        raise TypeError("a typer application with a callback is a group")
    return command


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"dsft {__version__}")
        raise typer.Exit


def _end_on_signals() -> dict[signal.Signals, Any]:
    """Let SIGTERM and SIGHUP end the command by an exception; returns the handlers that were there.

    A SIGHUP that is ignored stays so: nohup relies on it.
    """
    name = signal.SIGTERM.name

    def end(*_: object) -> NoReturn:
        from dsft.cli.errors import Terminated

        raise Terminated(name)

    def hang_up(*_: object) -> None:
        nonlocal name
        name = signal.SIGHUP.name
        signal.raise_signal(signal.SIGTERM)  # so that what holds SIGTERM back for a while holds this one too

    previous: dict[signal.Signals, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, end)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    return previous


def _end_with(error: BaseException, *, use_json: bool) -> int:
    from dsft.cli.errors import report
    from dsft.cli.noise import is_debugging
    from dsft.cli.output import READER_GONE_ERRORS, Output, discard_output, is_reader_gone

    if isinstance(error, SystemExit) and not isinstance(error.__context__, READER_GONE_ERRORS):
        return int(error.code or 0) if error.code is None or isinstance(error.code, int) else ExitCode.FAILURE
    # Some libraries turn a closed pipe into SystemExit; a broken pipe to a process of our own is no such thing.
    if isinstance(error, SystemExit) or (isinstance(error, READER_GONE_ERRORS) and is_reader_gone()):
        discard_output()
        return ExitCode.DONE
    if is_debugging():
        import traceback

        traceback.print_exception(error)
    told = report(error)
    try:
        Output(use_json=use_json).fail(told)
    except OSError:
        discard_output()
    return told.exit_code
