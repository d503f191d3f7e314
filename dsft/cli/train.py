"""`dsft train`: resolve the configuration, run, and draw what the run tells."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsft.cli.events import make_record, outlive_reader
from dsft.cli.options import RUN_PANEL, ConfigOption, JsonOption, PresetOption, QuietOption, takes_settings
from dsft.cli.output import Mode, Output
from dsft.core.errors import ConfigError

if TYPE_CHECKING:
    from dsft.core.config.load import ResolvedConfig
    from dsft.train.events import Event, EventSink


@takes_settings
def train(
    flags: dict[str, Any],
    *,
    preset: PresetOption = None,
    config: ConfigOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=RUN_PANEL)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run's folders.", rich_help_panel=RUN_PANEL)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show configuration, data and one sample, then stop.", rich_help_panel=RUN_PANEL
        ),
    ] = False,
    use_json: JsonOption = False,
    is_quiet: QuietOption = False,
) -> None:
    """Fine-tune a model with QLoRA."""
    from dsft.core.config.load import load_train_config

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other.", "Give one of them.")
    resolved = load_train_config(preset, config, flags)
    output = Output(use_json=use_json, is_quiet=is_quiet)
    if dry_run:
        _show_dry_run(resolved, output)
    else:
        _run(resolved, output, resume=resume, overwrite=overwrite)


def _run(resolved: "ResolvedConfig", output: Output, *, resume: bool, overwrite: bool) -> None:
    from dsft.train.run import run_train

    with open_progress(output) as sink:
        result = run_train(resolved, resume=resume, overwrite=overwrite, sink=sink)
    from dsft.cli.views.summary import render_summary

    output.show(render_summary(result))
    output.emit(make_record(result))


def _show_dry_run(resolved: "ResolvedConfig", output: Output) -> None:
    from dsft.cli.views.config import render_config, render_plan
    from dsft.cli.views.data_report import render_data_report, render_sample
    from dsft.train.run import dry_run

    output.show(render_config(resolved))
    with open_progress(output) as sink:
        dry = dry_run(resolved, sink=sink)
    output.show(render_data_report(dry.report))
    output.show(render_sample(dry.preview))
    output.show(render_plan(dry))
    output.emit(make_record(dry))


@contextmanager
def open_progress(output: Output) -> "Iterator[EventSink]":
    """Give a run's events their place: a live display, JSON lines, or (quietly) the warnings alone."""
    if output.mode is Mode.HUMAN:
        from dsft.cli.views.progress import ProgressView

        with ProgressView(output.stderr) as sink:
            yield sink
    else:
        yield outlive_reader(_json_sink(output) if output.mode is Mode.JSON else _quiet_sink(output))


def _json_sink(output: Output) -> "Callable[[Event], None]":
    return lambda event: output.emit(make_record(event))


def _quiet_sink(output: Output) -> "Callable[[Event], None]":
    from dsft.cli.views.progress_lines import plan_change_message
    from dsft.train.events import Notice, PlanChanged

    def sink(event: "Event") -> None:
        if isinstance(event, Notice) and event.level == "warning":
            output.warn(event.text)
        elif isinstance(event, PlanChanged):
            output.warn(plan_change_message(event).removeprefix("warning: "))

    return sink
