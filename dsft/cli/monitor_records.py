"""Samples where there is no live screen: a table for `--once`, lines, JSON objects; and what fires is told."""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsft.cli.events import make_record
from dsft.cli.output import Mode, Output, drop_unwritten
from dsft.cli.terminal_writes import StalledError, held_while_written
from dsft.cli.views.monitor.fired import FiredAlerts, UnknownAlerts, identify
from dsft.monitor.config import MonitorConfig
from dsft.monitor.sample import AlertSample, Problem, Sample

_LAST_S = 0.4
"""How long a terminal may take to take what is told after its screen."""


def make_sink(config: MonitorConfig, output: Output) -> Callable[[Sample], None]:
    """Return what writes samples to stdout, each when it comes."""
    if output.mode is Mode.JSON:
        return lambda sample: output.emit(make_record(sample))
    if output.mode is Mode.QUIET:
        return (lambda _: None) if config.is_once else _make_problem_teller(output)
    if config.is_once:
        return lambda sample: _show_once(sample, output)
    return _make_line_writer(output)


def make_csv_sink(output: Output) -> Callable[[Sample], None]:
    """Return what writes samples to stdout as rows of a CSV file, the names of the columns first."""
    from dsft.monitor.csv_log import HEADER_ROW, format_rows

    start = HEADER_ROW

    def write(sample: Sample) -> None:
        nonlocal start
        output.write(start + format_rows(sample), end="")
        start = ""

    return write


@contextmanager
def written_whole() -> Iterator[None]:
    """Have a line or row that is begun written to its end, as long as its reader takes it."""
    with held_while_written():
        try:
            yield
        except StalledError:  # the signal takes effect now, and nothing is to wait for this reader again
            drop_unwritten(sys.stdout)
            drop_unwritten(sys.stderr)


class AlertTeller:
    """Tells on stderr when a limit begins to be passed, when that is over, and when nobody can say.

    Args:
        output: Where.
        is_silent: Whether something else shows alerts, so that they are only remembered, to be told afterwards.

    Attributes:
        has_fired: Whether any limit has been passed.
    """

    def __init__(self, output: Output, *, is_silent: bool) -> None:
        self._output = output
        self._is_silent = is_silent
        self._fired = FiredAlerts()
        self._unknown = UnknownAlerts()
        self._untold: dict[tuple[str, int | None, int | None], tuple[str, AlertSample]] = {}
        self.has_fired = False

    def take(self, sample: Sample) -> None:
        """Look at a sample."""
        self.has_fired |= any(alert.is_fired for alert in sample.alerts)
        if not sample.alerts:
            return
        changed = self._fired.take(sample.alerts)
        if self._is_silent:
            for alert in changed:
                if alert.is_fired:
                    self._untold.setdefault(identify(alert), (sample.time, alert))
            return
        from dsft.cli.views.monitor.plain_lines import describe_alert

        self._unknown.take(sample.alerts)
        for alert in sample.alerts:
            if alert in self._unknown.begun:
                self._output.warn(describe_alert(alert))
            if alert in changed:
                self._tell(sample.time, alert)

    def tell_untold(self) -> None:
        """Tell what fired while something else showed alerts: each limit on each device once, as it first began."""
        with held_while_written(limit_s=_LAST_S):
            try:
                for time, alert in self._untold.values():
                    self._tell(time, alert)
            except StalledError:
                drop_unwritten(sys.stderr)
        self._untold.clear()

    def _tell(self, time: str, alert: AlertSample) -> None:
        from dsft.cli.views.monitor.plain_lines import describe_alert, format_clock

        self._output.alarm(f"{format_clock(time)} {describe_alert(alert)}", is_over=not alert.is_fired)


def _make_problem_teller(output: Output) -> Callable[[Sample], None]:
    """Return what warns when a GPU begins to be unreadable: a watch for alerts must not fall silent by that."""
    from dsft.monitor.run import find_problems

    told: frozenset[Problem] = frozenset()

    def take(sample: Sample) -> None:
        nonlocal told
        problems = find_problems(sample)
        for problem in problems:
            if problem not in told:
                output.warn(problem.found)
        told = frozenset(problems)

    return take


def _show_once(sample: Sample, output: Output) -> None:
    from dsft.cli.views.ascii import AsciiFallback
    from dsft.cli.views.monitor.layout import render_sample

    output.show(AsciiFallback(render_sample(sample, output.stdout.width, socket.gethostname())))


def _make_line_writer(output: Output) -> Callable[[Sample], None]:
    from dsft.cli.views.ascii import to_encodable
    from dsft.cli.views.monitor.plain_lines import format_sample

    ends_told: set[str] = set()
    problems_told: dict[int | None, Problem] = {}

    def write(sample: Sample) -> None:
        for line in format_sample(sample, ends_told, problems_told):
            output.write(to_encodable(line, output.stdout.encoding))

    return write
