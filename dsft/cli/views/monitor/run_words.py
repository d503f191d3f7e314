"""What is said of a training run, on the screen and in plain lines alike."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePosixPath

from dsft.cli.views.monitor.line import printable
from dsft.core.units import format_duration
from dsft.monitor.sample import RunSample


def name_runs(runs: Sequence[RunSample]) -> list[tuple[str, str]]:
    """Return each run's name and, where another has the same, as much of its output folder's end as tells them apart.

    Args:
        runs: All that are shown.
    """
    names = [printable(run.run_name) for run in runs]
    if len(set(names)) == len(names):
        return [(name, "") for name in names]
    folders = [PurePosixPath(run.event_log).parent.parts for run in runs]
    told = []
    for name, folder in zip(names, folders, strict=True):
        namesakes = [other for other, its_name in zip(folders, names, strict=True) if its_name == name]
        told.append((name, printable(_find_end(folder, namesakes)) if len(namesakes) > 1 else ""))
    return told


def describe_stage(run: RunSample) -> str:
    """Return what a run does, e.g. `training · silent for 1 min 05 s`."""
    silence = describe_silence(run)
    return f"{run.stage} · {silence}" if silence else run.stage


def describe_silence(run: RunSample) -> str:
    """Return for how long an overdue run has told nothing; empty where all is well."""
    if not run.is_overdue or run.last_event_age_s is None:
        return ""
    return f"silent for {format_duration(run.last_event_age_s)}"


def describe_outcome(run: RunSample) -> str:
    """Return how a run ended, e.g. `finished`."""
    if run.outcome != "unknown":
        return run.outcome or ""
    return "ended while loading" if run.stage == "loading" else "ended"


def format_end_time(run: RunSample) -> str:
    """Return the time of day here at which a run ended."""
    return "" if run.ended is None else f"{datetime.fromisoformat(run.ended).astimezone():%H:%M}"


def _find_end(folder: tuple[str, ...], namesakes: Sequence[tuple[str, ...]]) -> str:
    """Return the shortest end of a path that no other has, or all of it."""
    for length in range(1, len(folder)):
        if sum(other[-length:] == folder[-length:] for other in namesakes) == 1:
            return "/".join(folder[-length:])
    return str(PurePosixPath(*folder))
