"""`dsft monitor`: options in, samples out: on the live screen, as lines, as JSON, into a CSV file."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsft.cli.errors import Terminated, report
from dsft.cli.options import JsonOption, QuietOption
from dsft.cli.output import Mode, Output
from dsft.core.errors import ConfigError, DsftError, ExitCode
from dsft.core.units import GIB
from dsft.monitor.config import MonitorConfig

if TYPE_CHECKING:
    from dsft.monitor.sample import Sample

_STDOUT_NAMES = frozenset({"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})
"""What --csv takes for stdout, which is written by one alone."""

_WATCHED_PANEL = "What is watched"
_SCRIPTS_PANEL = "For scripts"


def monitor(
    *,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="N,N",
            help="Watch these GPUs alone: indexes as nvidia-smi counts them, or UUIDs.",
            rich_help_panel=_WATCHED_PANEL,
            show_default=False,
        ),
    ] = None,
    no_cpu: Annotated[
        bool,
        typer.Option(
            "--no-cpu", help="Leave out CPU, memory, swap and disk of the host.", rich_help_panel=_WATCHED_PANEL
        ),
    ] = False,
    alert: Annotated[
        list[str] | None,
        typer.Option(
            "--alert",
            metavar="'NAME>X'",
            help="Tell when a limit is passed, by message and bell, and end with code 4 (with --once, --duration); "
            "several may be given. Names: vram, util, bandwidth, fan (%), free (GiB), temp, memtemp (°C), power (W), "
            "ecc (errors), and cpu, ram, swap, disk (%) of the host.",
            rich_help_panel=_WATCHED_PANEL,
            show_default=False,
        ),
    ] = None,
    interval: Annotated[
        float,
        typer.Option(
            "--interval", metavar="S", help="Seconds between samples, from 0.1 on.", rich_help_panel=_WATCHED_PANEL
        ),
    ] = MonitorConfig.interval_s,
    duration: Annotated[
        float | None,
        typer.Option(
            "--duration", metavar="S", help="End by itself after so many seconds.", rich_help_panel=_WATCHED_PANEL
        ),
    ] = MonitorConfig.duration_s,
    once: Annotated[
        bool, typer.Option("--once", help="Take one sample and end.", rich_help_panel=_SCRIPTS_PANEL)
    ] = False,
    csv_file: Annotated[
        str | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Append a row for each GPU and sample to a CSV file; - writes them to stdout, in place of all else.",
            rich_help_panel=_SCRIPTS_PANEL,
        ),
    ] = None,
    wait_free: Annotated[
        float | None,
        typer.Option(
            "--wait-free",
            metavar="GIB",
            help="Return when a GPU has so many GiB free, and print its UUID (for CUDA_VISIBLE_DEVICES); --duration "
            "sets how long to wait at most.",
            rich_help_panel=_SCRIPTS_PANEL,
        ),
    ] = None,
    use_json: JsonOption = False,
    is_quiet: QuietOption = False,
) -> None:
    """Show what GPUs, host and training runs do."""
    from dsft.monitor.alerts import parse_alert

    config = MonitorConfig(
        gpus=tuple(name.strip() for names in gpu or () for name in names.split(",")),
        reads_host=not no_cpu,
        interval_s=interval,
        duration_s=duration,
        is_once=once,
        alerts=tuple(dict.fromkeys(map(parse_alert, alert or ()))),
    )
    output = Output(use_json=use_json, is_quiet=is_quiet)
    try:
        if wait_free is None:
            _watch(config, output, csv_file)
        else:
            _check_wait(config, wait_free, csv_file)
            from dsft.cli.monitor_wait import wait

            wait(config, output, round(wait_free * GIB))
    except KeyboardInterrupt:  # the usual way to end a monitor, nothing is lost by it
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except Terminated:
        raise typer.Exit(ExitCode.TERMINATED) from None


def _check_wait(config: MonitorConfig, free_gib: float, csv_file: str | None) -> None:
    if not 0 < free_gib * GIB < float("inf"):
        raise ConfigError(f"--wait-free is {free_gib:g}.", "Give GiB, more than 0, e.g. --wait-free 20.")
    others = {
        "--once": config.is_once,
        "--alert": bool(config.alerts),
        "--csv": csv_file is not None,
        "--no-cpu": not config.reads_host,
    }
    for option, is_given in others.items():
        if is_given:
            raise ConfigError(f"--wait-free and {option} do not go together.", "Give one of them.")


def _watch(config: MonitorConfig, output: Output, csv_file: str | None) -> None:
    from dsft.cli.monitor_records import AlertTeller, make_csv_sink, make_sink, written_whole
    from dsft.cli.views.event_view import can_redraw
    from dsft.monitor.run import open_sampler, watch

    is_live = output.mode is Mode.HUMAN and not config.is_once and can_redraw(output.stdout) and _has_terminal_name()
    rows_to_stdout = csv_file in _STDOUT_NAMES
    _check_csv(csv_file, output, is_live=is_live)
    # The live screen shows alerts itself.
    teller = AlertTeller(output, is_silent=is_live)
    sinks: list[Callable[[Sample], None]] = []
    if rows_to_stdout:
        sinks.append(make_csv_sink(output))
    elif not is_live:
        sinks.append(make_sink(config, output))
    sinks.append(teller.take)
    sampler = open_sampler(config)
    with ExitStack() as stack:
        if csv_file is not None and not rows_to_stdout:
            from dsft.monitor.csv_log import CsvLog

            sinks.append(stack.enter_context(CsvLog(Path(csv_file))).write)

        def sink(sample: "Sample") -> None:
            with written_whole():
                for take in sinks:
                    take(sample)

        if is_live:
            from dsft.cli.monitor_screen import run_screen

            try:
                last = run_screen(output, config, sampler, sink)
            finally:
                teller.tell_untold()  # the screen has taken its banners with it
        else:
            last = watch(config, sampler, sink)
    _end(config, output, last, has_fired=teller.has_fired)


def _check_csv(csv_file: str | None, output: Output, *, is_live: bool) -> None:
    if csv_file == "":
        raise ConfigError("--csv has no file name.", "Give one, or - for stdout.")
    if csv_file not in _STDOUT_NAMES:
        return
    if output.mode is Mode.JSON:
        raise ConfigError(f"--csv {csv_file} and --json both write to stdout.", "Give one, or a file for --csv.")
    if is_live:
        raise ConfigError(
            f"--csv {csv_file} writes to stdout, where the live screen is.",
            "Send stdout into a file or pipe, give a file for --csv, or add --quiet for rows alone.",
        )


def _has_terminal_name() -> bool:
    return bool(os.environ.get("TERM"))  # without one nobody knows what the terminal understands


def _end(config: MonitorConfig, output: Output, last: "Sample", *, has_fired: bool) -> None:
    """End with the code of what is wrong, if anything is.

    Raises:
        typer.Exit: Something is.
    """
    from dsft.monitor.run import check_alerts_are_known, check_gpus

    try:
        check_gpus(last)
        if has_fired and (config.is_once or config.duration_s is not None):
            raise typer.Exit(ExitCode.ALERT)
        if config.is_once or config.duration_s is not None:
            check_alerts_are_known(last)
    except DsftError as error:
        # The last sample itself says it in JSON, where there is one object for each sample and no other.
        output.fail(report(error), is_record=False)
        raise typer.Exit(error.exit_code) from None
