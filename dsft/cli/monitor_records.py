"""Samples where there is no live screen: a table for `--once`, lines, JSON objects; and what fires is told."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsft.cli.events import make_record
from dsft.cli.output import Mode, Output, drop_unwritten
from dsft.cli.terminal_writes import StalledError, held_while_written
from dsft.cli.views.monitor.fired import FiredAlerts
from dsft.monitor.config import MonitorConfig
from dsft.monitor.sample import AlertSample, Problem, Sample

_NUM_UNKNOWN = 2
"""After so many samples without a value that is told: the first look at a CPU never has one."""


def make_sink(config: MonitorConfig, output: Output) -> Callable[[Sample], None]:
    """Return what writes samples to stdout, each when it comes."""
    if output.mode is Mode.JSON:
        return lambda sample: output.emit(make_record(sample))
    if output.mode is Mode.QUIET:
        return (lambda _: None) if config.is_once else _make_problem_teller(output)
    if config.is_once:
        return lambda sample: _show_once(sample, output)
    ends_told: set[str] = set()
    return lambda sample: _write_lines(sample, output, ends_told)


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
        is_silent: Whether something else shows alerts, so that they are only remembered.

    Attributes:
        has_fired: Whether any limit has been passed.
    """

    def __init__(self, output: Output, *, is_silent: bool) -> None:
        self._output = output
        self._is_silent = is_silent
        self._fired = FiredAlerts()
        self._num_unknown: Counter[tuple[str, int | None]] = Counter()
        self.has_fired = False

    def take(self, sample: Sample) -> None:
        """Look at a sample."""
        self.has_fired |= any(alert.is_fired for alert in sample.alerts)
        if self._is_silent or not sample.alerts:
            return
        from dsft.cli.views.monitor.plain_lines import describe_alert

        changed = self._fired.take(sample.alerts)
        for alert in sample.alerts:
            if self._is_unknown(alert):
                self._output.warn(describe_alert(alert))
            if alert in changed:
                self._output.alarm(describe_alert(alert), is_over=not alert.is_fired)

    def _is_unknown(self, alert: AlertSample) -> bool:
        key = (alert.alert, alert.gpu_index)
        self._num_unknown[key] = 0 if alert.is_fired is not None else self._num_unknown[key] + 1
        return self._num_unknown[key] == _NUM_UNKNOWN


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

    output.show(AsciiFallback(render_sample(sample, output.stdout.width)))


def _write_lines(sample: Sample, output: Output, ends_told: set[str]) -> None:
    from dsft.cli.views.ascii import to_encodable
    from dsft.cli.views.monitor.plain_lines import format_sample

    for line in format_sample(sample, ends_told):
        output.write(to_encodable(line, output.stdout.encoding))
