"""Follows the training runs on this machine, by the files they leave and by their event logs, to their ends."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from dsft.core.live_runs import LiveRun, read_live_runs
from dsft.core.paths import live_runs_dir
from dsft.core.process_identity import find_process_place, read_start_ticks
from dsft.monitor.event_log import EventLog
from dsft.monitor.run_state import RunState
from dsft.monitor.sample import RunSample

_NUM_ENDED_KEPT, _ENDED_KEPT_S = 3, 12 * 3600.0


class LiveRuns:
    """Reads all runs, and remembers for a while those that it saw go on.

    Args:
        folder: Where their files are; the user's own by default.
        clock: Tells the time in seconds since the epoch.
    """

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder if folder is not None else _find_folder()
        self._clock = clock
        self._followed: dict[LiveRun, _FollowedRun] = {}
        self._ended: list[tuple[float, RunSample]] = []  # when that was noticed; the newest first

    def read(self) -> tuple[RunSample, ...]:
        """Return the runs that are going on now, oldest first, then those that ended lately, newest first."""
        runs = read_live_runs(self._folder) if self._folder is not None else ()
        now_s = self._clock()
        for run in [run for run in self._followed if run not in runs]:
            self._ended.insert(0, (now_s, self._followed.pop(run).end(now_s)))
        live = tuple(self._follow(run).read(now_s) for run in runs)
        if self._ended:
            self._forget_ended(now_s, {run.event_log for run in runs})
        return (*live, *(sample for _, sample in self._ended))

    def _follow(self, run: LiveRun) -> "_FollowedRun":
        if run not in self._followed:
            self._followed[run] = _FollowedRun(run)
        return self._followed[run]

    def _forget_ended(self, now_s: float, taken_logs: set[str]) -> None:
        """Forget runs that ended long ago, and those whose output folder another run has gone on in."""
        kept: list[tuple[float, RunSample]] = []
        for noticed_s, sample in self._ended:
            if sample.event_log not in taken_logs and now_s - noticed_s < _ENDED_KEPT_S:
                taken_logs.add(sample.event_log)
                kept.append((noticed_s, sample))
        self._ended = kept[:_NUM_ENDED_KEPT]


class _FollowedRun:
    """One run, its event log and what that has told so far."""

    def __init__(self, run: LiveRun) -> None:
        self._run = run
        self._log = EventLog(Path(run.event_log), _parse_time_s(run.registered))
        self._state = RunState()

    def read(self, now_s: float) -> RunSample:
        """Return the run as it is now."""
        stage = "unknown" if not self._read_log() else self._state.stage
        return self._state.describe(self._run, stage, now_s)

    def end(self, now_s: float) -> RunSample:
        """Return the run as it was at its end, and close its event log."""
        can_be_read = self._read_log()
        self._log.close()
        sample = self._state.describe(self._run, self._state.stage, now_s)
        noticed = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds")
        outcome = self._state.outcome
        if outcome is None:
            # An orderly end before the first event (a model that can't be loaded, say) leaves as little as a kill.
            is_killed = can_be_read and self._state.has_begun and _is_gone(self._run)
            outcome = "killed" if is_killed else "unknown"
        return replace(
            sample,
            outcome=outcome,
            ended=self._state.newest or noticed,
            is_overdue=False,
            eta_s=None,
            tok_per_s=None,
            last_event_age_s=None,
        )

    def _read_log(self) -> bool:
        """Take what is new in the event log; return whether it can be read."""
        try:
            new = self._log.read()
        except FileNotFoundError:
            # The log is made once the model is loaded; a run in a container has its folders where they can't be seen.
            return Path(self._run.output_dir).is_dir()
        except OSError:
            return False
        if new.begins_anew:
            self._state = RunState()
        for event in new.events:
            self._state.take(event)
        return True


def _is_gone(run: LiveRun) -> bool:
    """Return whether the process is over, as far as that can be told from here."""
    if run.pid_namespace is None or run.pid_namespace != find_process_place().pid_namespace:
        return True
    try:
        return read_start_ticks(run.pid) != run.start_ticks
    except OSError:
        return False


def _find_folder() -> Path | None:
    try:
        return live_runs_dir()
    except RuntimeError:  # the user has no home folder
        return None


def _parse_time_s(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return 0.0
