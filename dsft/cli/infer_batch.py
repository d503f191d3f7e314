"""`dsft infer --file`: the prompts of a file answered, with a bar, into a file or as JSON lines on stdout."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dsft.cli.errors import Terminated
from dsft.cli.events import outlive_reader
from dsft.cli.output import Mode, Output, to_json
from dsft.core.errors import DsftError, ExitCode

if TYPE_CHECKING:
    from dsft.infer.batch import BatchRequest
    from dsft.infer.batch_events import BatchProgress
    from dsft.infer.config import InferConfig

_STDOUT_NAME = Path("-")


def answer_file(config: "InferConfig", output: Output, request: "BatchRequest") -> None:
    """Answer the prompts of a file.

    Args:
        config: Which model answers, and how.
        output: Where is told how far it is, and the answers go without a file for them.
        request: Which prompts, and where the answers go.

    Raises:
        DsftError: It can't be begun or gone on with.
        typer.Exit: Rows have failed; with code 1, when all others are answered.
    """
    if request.output == _STDOUT_NAME:
        request = replace(request, output=None)
    latest: list[BatchProgress] = []
    try:
        result = _answer(config, output, request, latest)
    except (KeyboardInterrupt, Terminated) as stop:
        kept = _describe_kept(request, latest)
        if kept:
            stop.add_note(kept)
        raise
    except DsftError:
        kept = _describe_kept(request, latest)
        if kept:
            output.note(kept)
        raise
    if result:
        raise typer.Exit(ExitCode.FAILURE)


def _answer(config: "InferConfig", output: Output, request: "BatchRequest", latest: "list[BatchProgress]") -> int:
    """Answer the prompts; return how many rows have failed."""
    from dsft.cli.views.infer_batch import describe_batch
    from dsft.infer.batch import run_batch
    from dsft.infer.batch_events import BatchListener

    with _open_progress(output, request) as show:

        def take_progress(progress: "BatchProgress") -> None:
            latest[:] = [progress]
            show(progress)

        note: Callable[[str], None] = output.note
        warn: Callable[[str], None] = output.warn
        if request.output is not None:  # answers for a file do not depend on who reads what is told
            note, warn = outlive_reader(note), outlive_reader(warn)
        listener = BatchListener(note, warn, take_progress, lambda record: _give_out(output, record))
        result = run_batch(config, request, listener)
    output.emit(asdict(result))
    output.note(describe_batch(result))
    return result.num_failed


@contextmanager
def _open_progress(output: Output, request: "BatchRequest") -> "Iterator[Callable[[BatchProgress], None]]":
    # Answers that come to the terminal say themselves how far it is.
    if output.mode is not Mode.HUMAN or (request.output is None and output.stdout.is_terminal):
        yield lambda _: None
        return
    from dsft.cli.views.infer_batch_live import open_batch_view

    with open_batch_view(output.stderr) as sink:
        yield sink


def _give_out(output: Output, record: Mapping[str, Any]) -> None:
    if output.mode is Mode.JSON:
        output.emit(record)
    else:
        output.write(to_json(record))


def _describe_kept(request: "BatchRequest", latest: "list[BatchProgress]") -> str | None:
    """Return what a batch that did not come to its end leaves."""
    if not latest or request.output is None:
        return None
    if request.output.exists():
        return f"{request.output} was complete by then."
    num_kept, num_rows = latest[0].num_resumed + latest[0].num_answered, latest[0].num_rows
    if not num_kept:
        return None
    return f"{num_kept} of {num_rows} rows are answered and kept; the same command goes on with the others."
