"""`dsft bench`: choose the rows, measure them, draw or write what was found."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsft.cli.errors import Terminated, report
from dsft.cli.options import RUN_PANEL, ConfigOption, JsonOption, PresetOption, QuietOption, takes_settings
from dsft.cli.output import Mode, Output, to_json
from dsft.core.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dsft.bench.options import BenchOptions, BenchSink, Progress
    from dsft.bench.result import BenchResult, RowResult
    from dsft.bench.rows import BenchRow

_PANEL = "Bench"

_MOST_STEPS = 10_000

_REFRESHES_PER_S = 2
"""Drawing takes time from the thread that launches kernels."""


@takes_settings
def bench(
    flags: dict[str, Any],
    *,
    preset: PresetOption = None,
    config: ConfigOption = None,
    grid: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML list of configurations, run one by one.", rich_help_panel=_PANEL),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=_MOST_STEPS, metavar="N", help="Steps measured.", rich_help_panel=_PANEL)
    ] = 10,
    warmup_steps: Annotated[
        int, typer.Option(min=0, max=_MOST_STEPS, metavar="N", help="Steps run before those.", rich_help_panel=_PANEL)
    ] = 2,
    ceiling_seconds: Annotated[
        float,
        typer.Option(
            min=0, metavar="X", help="Seconds to time the matrix products alone; 0: not at all.", rich_help_panel=_PANEL
        ),
    ] = 5.0,
    profile: Annotated[
        bool | None,
        typer.Option(
            "--profile/--no-profile",
            help="Look where a step's time goes; the default is yes, and no with --grid.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    random_data: Annotated[
        bool,
        typer.Option(
            "--random-data", help="Full-length random sequences, whatever data is named.", rich_help_panel=_PANEL
        ),
    ] = False,
    baseline: Annotated[
        Literal["plain"] | None,
        typer.Option(help="Run the plain transformers + peft path beside each row.", rich_help_panel=_PANEL),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Show ratios to an earlier --json result.", rich_help_panel=_PANEL),
    ] = None,
    use_markdown: Annotated[
        bool, typer.Option("--markdown", help="Write the table as Markdown.", rich_help_panel=RUN_PANEL)
    ] = False,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="Write the JSON result into a file too.", rich_help_panel=RUN_PANEL
        ),
    ] = None,
    use_json: JsonOption = False,
    is_quiet: QuietOption = False,
) -> None:
    """Measure the speed and memory of configurations."""
    from dsft.bench.comparison import read_record
    from dsft.bench.options import BenchOptions
    from dsft.bench.result_file import check_output

    if use_markdown and use_json:
        raise ConfigError("--markdown and --json both say how the result is written.", "Give one of them.")
    old = read_record(compare) if compare is not None else None
    if output_file is not None:
        check_output(output_file)
    output = Output(use_json=use_json, is_quiet=is_quiet)
    rows = _choose_rows(preset, config, flags, grid, output)
    options = BenchOptions(
        num_steps=steps,
        num_warmup_steps=warmup_steps,
        ceiling_s=ceiling_seconds,
        is_profiled=grid is None if profile is None else profile,
        has_baseline=baseline == "plain",
        use_random=random_data,
    )
    writer = _ResultWriter(output, old, output_file, use_markdown=use_markdown)
    try:
        with _open_sink(output, writer) as sink:
            _run(rows, options, sink)
    except (KeyboardInterrupt, Terminated) as ended:
        writer.finish()
        told = report(ended)
        output.note(f"Stopped by {told.found.partition(';')[0]}; what was measured by then is shown.")
        raise typer.Exit(told.exit_code) from None
    exit_code = writer.finish()
    if exit_code != ExitCode.DONE:
        raise typer.Exit(exit_code)


def _choose_rows(
    preset: str | None, config: Path | None, flags: dict[str, Any], grid: Path | None, output: Output
) -> "list[BenchRow]":
    from dsft.bench.rows import choose_rows, is_choice
    from dsft.bench.run import find_gpu

    if is_choice(preset, config, flags, grid):
        return choose_rows(preset, config, flags, grid, has_gpu=True)
    has_gpu = flags.get("device") != "cpu" and find_gpu()
    if not has_gpu and flags.get("device") != "cuda":
        output.note("Without a GPU there is the tiny preset to measure, on the CPU.")
    return choose_rows(preset, config, flags, grid, has_gpu=has_gpu)


def _run(rows: "list[BenchRow]", options: "BenchOptions", sink: "BenchSink") -> None:
    from dsft.bench.run import run_bench

    run_bench(rows, options, sink)


class _ResultWriter:
    """Keeps the newest result, writes it into the file, and shows it at the end."""

    def __init__(self, output: Output, old: dict[str, Any] | None, file: Path | None, *, use_markdown: bool) -> None:
        self._output = output
        self._old = old
        self._file = file
        self._use_markdown = use_markdown
        self._result: BenchResult | None = None
        self._is_written = True

    def take(self, result: "BenchResult") -> None:
        """Take the result so far; a file that can't be written is warned of, once until it can be again."""
        from dsft.bench.result_file import write_record

        self._result = result
        if self._file is None:
            return
        try:
            write_record(to_json(self._record(result)), self._file)
            self._is_written = True
        except OSError as error:
            if self._is_written:
                self._output.warn(f"--output: {self._file} can't be written: {error.strerror}.")
            self._is_written = False

    def finish(self) -> ExitCode:
        """Show the result, and return the exit code it stands for; a file that lacks it is a failure."""
        from dsft.bench.comparison import compare_results
        from dsft.cli.views.bench import format_markdown, render_bench

        result = self._result
        if result is None:  # stopped before the first row
            return ExitCode.FAILURE
        comparisons = compare_results(result, self._old) if self._old is not None else None
        if self._use_markdown:
            self._output.write(format_markdown(result, comparisons))
        else:
            self._output.answer(render_bench(result, comparisons))
        self._output.emit(self._record(result))
        if result.exit_code == ExitCode.DONE and not self._is_written:
            return ExitCode.FAILURE
        return result.exit_code

    def _record(self, result: "BenchResult") -> dict[str, Any]:
        from dsft.bench.comparison import compare_results

        record = asdict(result)
        if self._old is not None:
            record["comparisons"] = [asdict(row) for row in compare_results(result, self._old)]
        return record


@contextmanager
def _open_sink(output: Output, writer: _ResultWriter) -> "Iterator[BenchSink]":
    """Give what a bench tells its place: a line that changes on a terminal, a line for each row in any case."""
    from dsft.bench.options import BenchSink
    from dsft.cli.views.bench import describe_progress, describe_row

    if output.mode is not Mode.HUMAN:
        yield BenchSink(lambda _progress: None, lambda _row: None, writer.take)
        return
    with output.stderr.status("starting", refresh_per_second=_REFRESHES_PER_S) as status:

        def on_progress(progress: "Progress") -> None:
            status.update(describe_progress(progress))

        def on_row(row: "RowResult") -> None:
            output.note(describe_row(row))

        yield BenchSink(on_progress, on_row, writer.take)
