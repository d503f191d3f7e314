"""`dsft merge`: options in, merge, show how far it has come and what came of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsft.cli.errors import Terminated
from dsft.cli.events import make_record, outlive_reader
from dsft.cli.options import RUN_PANEL, JsonOption, QuietOption
from dsft.cli.output import Mode, Output
from dsft.core.models.device import DeviceChoice
from dsft.merge.config import BaseRounding, GgufType, MergeConfig, OutputDtype

if TYPE_CHECKING:
    from dsft.merge.events import EventSink, Notice, Progress

_MODEL_PANEL = "Model"
_RESULT_PANEL = "Result"

_JSON_INTERVAL_S = 1.0


def merge(
    adapter: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a LoRA adapter; without it the newest finished run in ./trained_*.", show_default=False
        ),
    ] = MergeConfig.adapter,
    *,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Base model instead of the recorded one: folder, hub id or builtin:tiny/model.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = MergeConfig.base,
    base_rounding: Annotated[
        BaseRounding,
        typer.Option(
            help="What the update is added to: the base as it is stored, or (nf4) rounded to NF4 and back, as training "
            "computed with it.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = MergeConfig.base_rounding,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Merge into a base of another name than the recorded one, or of other weights.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = MergeConfig.force,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Folder of the merged model; without it merged_model in the adapter's folder.",
            rich_help_panel=_RESULT_PANEL,
        ),
    ] = MergeConfig.output,
    dtype: Annotated[
        OutputDtype,
        typer.Option(
            help="Number type of the merged weights; the sums are made in float32 and rounded to it once.",
            rich_help_panel=_RESULT_PANEL,
        ),
    ] = MergeConfig.dtype,
    gguf: Annotated[
        GgufType | None,
        typer.Option(
            help="Also write a GGUF file of this type and an Ollama Modelfile.", rich_help_panel=_RESULT_PANEL
        ),
    ] = MergeConfig.gguf,
    is_verifying: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the logits of the merged model with those of base and adapter, and fail if they differ by "
            "more than the number type explains.",
            rich_help_panel=_RESULT_PANEL,
        ),
    ] = MergeConfig.is_verifying,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a model in the output folder; it stays until the new one is complete.",
            rich_help_panel=_RESULT_PANEL,
        ),
    ] = MergeConfig.overwrite,
    device: Annotated[
        DeviceChoice,
        typer.Option(help="Where to compute; auto takes the GPU if there is one.", rich_help_panel=RUN_PANEL),
    ] = MergeConfig.device,
    use_json: JsonOption = False,
    is_quiet: QuietOption = False,
) -> None:
    """Merge a trained adapter into its base model."""
    config = MergeConfig(
        adapter=adapter,
        output=output_dir,
        base=base,
        dtype=dtype,
        base_rounding=base_rounding,
        device=device,
        is_verifying=is_verifying,
        gguf=gguf,
        overwrite=overwrite,
        force=force,
    )
    output = Output(use_json=use_json, is_quiet=is_quiet)
    complete: list[Path] = []
    try:
        _merge(config, output, complete.append)
    except (KeyboardInterrupt, Terminated) as stop:
        for target in complete:
            stop.add_note(f"{target} was complete by then; it holds the new model.")
        raise


def _merge(config: MergeConfig, output: Output, on_complete: Callable[[Path], None]) -> None:
    with open_progress(output) as sink:
        from dsft.merge.run import run_merge

        result = run_merge(config, sink, on_complete)
    from dsft.cli.views.merge import render_merge

    output.show(render_merge(result))
    output.emit(make_record(result))


@contextmanager
def open_progress(output: Output) -> "Iterator[EventSink]":
    """Give a merge's events their place: a live display, JSON lines, or (quietly) the warnings alone."""
    if output.mode is Mode.HUMAN:
        from dsft.cli.views.merge_live import open_merge_view

        with open_merge_view(output.stderr) as sink:
            yield sink
    elif output.mode is Mode.JSON:
        with _open_json_sink(output) as sink:
            yield sink
    else:
        yield outlive_reader(lambda event: _warn(event, output))


@contextmanager
def _open_json_sink(output: Output) -> "Iterator[EventSink]":
    from dsft.cli.views.merge_progress import ProgressChooser
    from dsft.merge.events import Progress

    chooser = ProgressChooser(_JSON_INTERVAL_S)
    emit = outlive_reader(lambda event: output.emit(make_record(event)))

    def sink(event: "Notice | Progress") -> None:
        for told in chooser.choose(event, time.monotonic()) if isinstance(event, Progress) else [event]:
            emit(told)

    try:
        yield sink
    finally:
        for report in chooser.finish():
            emit(report)


def _warn(event: "Notice | Progress", output: Output) -> None:
    from dsft.merge.events import Notice

    if isinstance(event, Notice) and event.level == "warning":
        output.warn(event.text)
