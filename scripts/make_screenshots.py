"""Draw docs/images: progress.svg and summary.svg from a finished run (its event log, replayed, and its summary),
estimate.svg from the presets, and monitor.svg from recorded samples.

python scripts/make_screenshots.py results_tiny trained_tiny --step 100
python scripts/make_screenshots.py                # those alone that need no run: estimate.svg and monitor.svg

Samples are lines as `dsft monitor --json` writes them; the screen shows the last one, with the others as its history.
"""

import argparse
import io
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import is_dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType
from rich.terminal_theme import MONOKAI

from dsft.cli.views.estimate import render_comparison
from dsft.cli.views.monitor.layout import draw_screen
from dsft.cli.views.monitor.line import Rows
from dsft.cli.views.monitor.state import MonitorState
from dsft.cli.views.progress_panel import render_progress
from dsft.cli.views.progress_state import ProgressState, advance
from dsft.cli.views.summary import render_summary
from dsft.core.memory.cards import RTX_4090
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.run import compare_presets
from dsft.monitor.sample import Sample
from dsft.train import events
from dsft.train.events import Event, RunStarted, StepDone
from dsft.train.folders import EVENT_LOG
from dsft.train.summary import read_summary

WIDTH = 100
HEIGHT = 60
MONITOR_HEIGHT = 20

IMAGES = Path("docs/images")

SVG_FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
)
"""rich's picture without the font it would fetch from the network: pages that show SVG files don't allow that."""


def main() -> None:
    """Read a run's folders and the samples, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, nargs="?", help="folder of checkpoints and of events.jsonl")
    parser.add_argument("save_dir", type=Path, nargs="?", help="folder of the adapter and of training_summary.json")
    parser.add_argument("--step", type=int, help="moment of the progress picture; default: two thirds of the run")
    parser.add_argument("--samples", type=Path, default=IMAGES / "monitor-samples.jsonl", help="of the monitor")
    parser.add_argument("--out", type=Path, default=IMAGES)
    options = parser.parse_args()
    if (options.output_dir is None) != (options.save_dir is None):
        parser.error("give both folders of the run, or none")

    options.out.mkdir(parents=True, exist_ok=True)
    if options.output_dir is not None:
        state, now_s = replay(read_events(options.output_dir / EVENT_LOG), options.step)
        save(render_progress(state, WIDTH, HEIGHT, now_s), options.out / "progress.svg")
        save(render_summary(read_summary(options.save_dir)), options.out / "summary.svg")
    estimate = compare_presets(Budget(RTX_4090, "gpu"))
    save(render_comparison(estimate), options.out / "estimate.svg", title='dsft estimate-memory --gpu "RTX 4090"')
    save(render_monitor(options.samples), options.out / "monitor.svg", title="dsft monitor")


def read_events(log: Path) -> list[tuple[float, Event]]:
    """Return the events of the last start of a run, each with its time in seconds."""
    timed: list[tuple[float, Event]] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        time_s = datetime.fromisoformat(fields.pop("time")).timestamp()
        event = getattr(events, fields.pop("event"))(**fields)
        timed = [] if isinstance(event, RunStarted) else timed
        timed.append((time_s, event))
    return timed


def replay(timed: list[tuple[float, Event]], step: int | None) -> tuple[ProgressState, float]:
    """Return the display's state just after a step (None: at two thirds of the steps), and its time."""
    num_steps = next(event.num_steps for _, event in timed if isinstance(event, RunStarted))
    last_step = step if step is not None else num_steps * 2 // 3
    state, now_s = ProgressState(), timed[0][0]
    for now_s, event in timed:
        state = advance(state, event, now_s)
        if isinstance(event, StepDone) and event.step >= last_step:
            break
    return state, now_s


def render_monitor(samples: Path) -> RenderableType:
    """Return the monitor's screen at the last of the samples; its time of day is UTC."""
    os.environ["TZ"] = "UTC"
    time.tzset()
    state = MonitorState(interval_s=1.0)
    for sample in read_samples(samples):
        state.take(sample)
    return Rows(draw_screen(state, WIDTH, MONITOR_HEIGHT).lines)


def read_samples(samples: Path) -> Iterator[Sample]:
    """Yield the samples of a file that `dsft monitor --json` has written."""
    for line in samples.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        assert fields.pop("event") == Sample.__name__
        yield restore(Sample, fields)


def restore(kind: Any, value: Any) -> Any:
    """Return a value read from JSON as the type that it was written from."""
    if isinstance(kind, UnionType):
        if value is None:
            return None
        kind = next(choice for choice in get_args(kind) if choice is not NoneType)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: restore(hints[name], item) for name, item in value.items()})
    if get_origin(kind) is tuple:
        return tuple(restore(get_args(kind)[0], item) for item in value)
    return value


def save(renderable: RenderableType, path: Path, title: str = "dsft train") -> None:
    """Draw as a terminal would and write it as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(renderable)
    console.save_svg(str(path), title=title, theme=MONOKAI, code_format=SVG_FORMAT)
    print(path)


if __name__ == "__main__":
    main()
