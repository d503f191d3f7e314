"""How far a merge has come: what is known of its phases, and it as a bar or as a line of words. Owns no screen."""

from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import clip, draw_bar
from dsft.core.units import GIB, format_duration, format_gib
from dsft.merge.events import Notice, Progress

_WORDS = {"merge": "merging", "write gguf": "writing gguf", "verify": "verifying"}
_LABEL_WIDTH = 2 + max(map(len, _WORDS.values()))

_WINDOW_S = 10.0
"""The rate is that of so many seconds: a disk is slower once what it has in memory is full."""

_SAMPLE_INTERVAL_S = 0.5

_MIN_BAR_WIDTH, _MAX_BAR_WIDTH = 8, 40
_FIGURES_WIDTH = 42
"""What the figures need nearly always; so the bar keeps its width while they change."""

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_SPINNER_FRAMES_PER_S = 8

MIB = 1024**2


@dataclass(frozen=True)
class PhaseProgress:
    """One phase; times are seconds on one monotonic clock.

    Attributes:
        phase: As the merge names it.
        done_bytes: Bytes of weights done.
        total_bytes: Bytes of weights of the whole phase.
        started_s: When its first report came.
        reported_s: When its newest report came.
        samples: Times and bytes of reports that the rate is measured from, oldest first.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    started_s: float
    reported_s: float
    samples: tuple[tuple[float, int], ...]

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left."""
        return self.done_bytes >= self.total_bytes

    @property
    def duration_s(self) -> float:
        """Seconds from its first report to its newest."""
        return self.reported_s - self.started_s

    @property
    def bytes_per_s(self) -> float | None:
        """Rate of the last seconds, of the whole phase once it is done; None before there is one."""
        since_s, since_bytes = (self.started_s, 0) if self.is_done else self.samples[0]
        seconds, num_bytes = self.reported_s - since_s, self.done_bytes - since_bytes
        return num_bytes / seconds if seconds > 0 and num_bytes > 0 else None

    def eta_s(self, now_s: float) -> float | None:
        """Return the seconds left, counted down since the newest report; None while there is no rate."""
        rate = self.bytes_per_s
        if rate is None:
            return None
        return max(0.0, (self.total_bytes - self.done_bytes) / rate - (now_s - self.reported_s))


def advance(phases: tuple[PhaseProgress, ...], report: Progress, now_s: float) -> tuple[PhaseProgress, ...]:
    """Return the phases after a report."""
    sample = (now_s, report.done_bytes)
    if not phases or phases[-1].phase != report.phase:
        new = PhaseProgress(report.phase, report.done_bytes, report.total_bytes, now_s, now_s, (sample,))
        return (*phases, new)
    current = phases[-1]
    samples = current.samples
    if now_s - samples[-1][0] >= _SAMPLE_INTERVAL_S:
        # One that is older than the window stays, so that slow reports have a rate too.
        while len(samples) > 1 and now_s - samples[1][0] >= _WINDOW_S:
            samples = samples[1:]
        samples = (*samples, sample)
    done = replace(
        current, done_bytes=report.done_bytes, total_bytes=report.total_bytes, reported_s=now_s, samples=samples
    )
    return (*phases[:-1], done)


class ProgressChooser:
    """Chooses which reports are told: the first and the last of each phase, and of the others one in an interval.

    Args:
        interval_s: Seconds between two that are told.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._newest: Progress | None = None
        self._told_s = 0.0
        self._left_out: Progress | None = None

    def choose(self, report: Progress, now_s: float) -> list[Progress]:
        """Return the reports to tell now that one has come at `now_s` (seconds on any monotonic clock)."""
        if report == self._newest and not self._left_out:
            return []  # nothing new: a phase that is done may say so again
        is_first = self._newest is None or self._newest.phase != report.phase
        before = self.finish() if is_first else []
        self._newest = report
        is_last = report.done_bytes >= report.total_bytes
        if is_first or is_last or now_s - self._told_s >= self._interval_s:
            self._told_s, self._left_out = now_s, None
            return [*before, report]
        self._left_out = report
        return []

    def finish(self) -> list[Progress]:
        """Return the newest report, if it was left out."""
        left_out, self._left_out = self._left_out, None
        return [] if left_out is None else [left_out]


def format_line(phase: PhaseProgress, now_s: float) -> str:
    """Return how far a phase has come as one line of ASCII words, stable for grep."""
    words = _WORDS[phase.phase]
    if phase.done_bytes == 0 and not phase.is_done:
        return f"{words} {format_size(phase.total_bytes)} ..."
    parts = [f"{words} {_format_done(phase)}"]
    rate, eta_s = phase.bytes_per_s, phase.eta_s(now_s)
    if rate is not None:
        parts.append(format_rate(rate))
    if phase.is_done:
        parts.append(f"took {format_duration(phase.duration_s)}")
    elif eta_s is not None:
        parts.append(f"eta {format_duration(eta_s)}")
    return "  ".join(parts)


def format_notice(notice: Notice) -> str:
    """Return a notice as a line."""
    return f"{'warning' if notice.level == 'warning' else 'note'}: {notice.text}"


def render_phases(phases: tuple[PhaseProgress, ...], width: int, now_s: float) -> RenderableType:
    """Draw a bar for each phase that has begun, at most `width` columns wide."""
    if not phases:
        frame = _SPINNER[int(now_s * _SPINNER_FRAMES_PER_S) % len(_SPINNER)]
        return AsciiFallback(clip(Text(f"{frame} starting", "dim"), width))
    return AsciiFallback(Group(*(_draw_phase(phase, width, now_s) for phase in phases)))


def format_size(num_bytes: int) -> str:
    """Return bytes as GiB, small ones as MiB, e.g. `12.6 GiB`, `3.6 MiB`."""
    return format_gib(num_bytes) if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def format_rate(bytes_per_s: float) -> str:
    """Return a rate in the unit that disks are sold by, e.g. `0.90 GB/s`."""
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def _format_done(phase: PhaseProgress) -> str:
    divisor = GIB if phase.total_bytes >= GIB else MIB
    return f"{phase.done_bytes / divisor:.1f} of {format_size(phase.total_bytes)}"


def _draw_phase(phase: PhaseProgress, width: int, now_s: float) -> Text:
    fraction = phase.done_bytes / phase.total_bytes if phase.total_bytes else 1.0
    figures = [_format_done(phase)]
    rate, eta_s = phase.bytes_per_s, phase.eta_s(now_s)
    if rate is not None:
        figures.append(format_rate(rate))
    if phase.is_done:
        figures.append(format_duration(phase.duration_s))
    elif eta_s is not None:
        figures.append(f"{format_duration(eta_s)} left")
    label = f"{_WORDS[phase.phase]:<{_LABEL_WIDTH}}"
    bar_width = min(_MAX_BAR_WIDTH, max(_MIN_BAR_WIDTH, width - len(label) - _FIGURES_WIDTH))
    while len(figures) > 1 and len(label) + bar_width + len(_join(figures)) > width:
        figures.pop()
    text = Text.assemble((label, "dim"))
    if len(label) + bar_width + len(_join(figures)) <= width:
        text.append_text(draw_bar(fraction, bar_width, "green" if phase.is_done else "cyan"))
        return clip(text.append(_join(figures)), width)
    return clip(text.append(figures[0]), width)


def _join(figures: list[str]) -> str:
    return f"  {' · '.join(figures)}"
