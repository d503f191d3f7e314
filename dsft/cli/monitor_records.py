"""Samples where there is no live screen: a table for `--once`, lines, JSON objects; and what fires is told."""

from collections.abc import Callable

from dsft.cli.events import make_record
from dsft.cli.output import Mode, Output
from dsft.monitor.config import MonitorConfig
from dsft.monitor.sample import Sample


def make_sink(config: MonitorConfig, output: Output) -> Callable[[Sample], None]:
    """Return what writes samples to stdout, each when it comes."""
    if output.mode is Mode.JSON:
        return lambda sample: output.emit(make_record(sample))
    if output.mode is Mode.QUIET:
        return lambda _: None
    if config.is_once:
        return lambda sample: _show_once(sample, output)
    return lambda sample: _write_lines(sample, output)


class AlertTeller:
    """Tells on stderr when a limit begins to be passed, and when that is over.

    Args:
        output: Where.
        is_silent: Whether something else shows alerts, so that they are only remembered.

    Attributes:
        has_fired: Whether any limit has been passed.
    """

    def __init__(self, output: Output, *, is_silent: bool) -> None:
        self._output = output
        self._is_silent = is_silent
        self._fired: frozenset[tuple[str, int | None]] = frozenset()
        self.has_fired = False

    def take(self, sample: Sample) -> None:
        """Look at a sample."""
        if not sample.alerts:
            return
        self.has_fired |= any(alert.is_fired for alert in sample.alerts)
        if self._is_silent:
            return
        from dsft.cli.views.monitor_lines import describe_alert

        fired = frozenset((alert.alert, alert.gpu_index) for alert in sample.alerts if alert.is_fired)
        for alert in sample.alerts:
            key = (alert.alert, alert.gpu_index)
            if (key in fired) != (key in self._fired):
                self._output.alarm(describe_alert(alert), is_over=key not in fired)
        self._fired = fired


def _show_once(sample: Sample, output: Output) -> None:
    from dsft.cli.views.ascii import AsciiFallback
    from dsft.cli.views.monitor_layout import render_sample

    output.show(AsciiFallback(render_sample(sample, output.stdout.width)))


def _write_lines(sample: Sample, output: Output) -> None:
    from dsft.cli.views.monitor_lines import format_sample

    for line in format_sample(sample):
        output.write(line)
