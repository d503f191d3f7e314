"""Time from the start of `dsft train` to the end of each phase and of the first optimizer step; prints JSON.

    python3 scripts/time_train_start.py [--repeats 3] -- --preset balanced --model-name MODEL_DIR ... > start.json

Each figure is of a process of its own, which is ended after its first step. "first" has nothing in its cache folder and
what it reads may not be in the page cache: it makes the others warm. "checkpoint" has the tokenized data of the first,
and quantizes; "copy" has the quantized copy too. "imports" says what the libraries take, one by one (with the
interpreter's own timing, which adds to it), and how many modules are compiled anew at each start.
"""

import argparse
import collections
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = ("checkpoint", "copy")

IMPORT_AS_TRAIN_DOES = """
import json, os, sys
from dsft.core.large_imports import import_bitsandbytes, large_imports
with large_imports():
    import_bitsandbytes()
    import dsft.train.fit
specs = [spec for module in list(sys.modules.values()) if (spec := getattr(module, "__spec__", None)) is not None]
compiled = [spec for spec in specs if spec.cached is not None]
missing = [spec.name for spec in compiled if not os.path.exists(spec.cached)]
print(json.dumps({"num_modules": len(specs), "num_without_bytecode": len(missing)}))
"""


def main() -> None:
    """Start the processes one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    parser.add_argument("--cache-dir", type=Path, help="folder in which all is kept meanwhile (default: /tmp's disk)")
    parser.add_argument("arguments", nargs="+", help="of dsft train, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.cache_dir) as folder:
        print(json.dumps(measure(options.arguments, options.repeats, Path(folder)), indent=2))


def measure(arguments: list[str], num_repeats: int, folder: Path) -> dict[str, Any]:
    """Return the record of all processes."""
    cache = folder / "cache"
    runs = [{"kind": "first", **start_run(arguments, folder, cache)}]
    for kind in KINDS:
        for _ in range(num_repeats):
            if kind == "checkpoint":
                for copy in cache.glob("dsft/nf4/*.safetensors"):
                    copy.unlink()
            runs.append({"kind": kind, **start_run(arguments, folder, cache)})
    return {
        "arguments": arguments,
        "device": runs[0]["device"],
        "copy_bytes": sum(path.stat().st_size for path in cache.glob("dsft/nf4/*.safetensors")),
        "is_always_the_same_loss": len({run["first_loss"] for run in runs}) == 1,
        "medians_s": {kind: take_medians([run["ends_s"] for run in runs if run["kind"] == kind]) for kind in KINDS},
        "imports": time_imports(),
        "runs": runs,
    }


def take_medians(ends_s: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {name: round(statistics.median(ends[name] for ends in ends_s), 3) for name in ends_s[0]}


def start_run(arguments: list[str], folder: Path, cache: Path) -> dict[str, Any]:
    """Run `dsft train` up to its first step and return when what had ended."""
    command = [sys.executable, "-m", "dsft", "train", *arguments, "--json", "--overwrite"]
    command += ["--output-dir", str(folder / "run"), "--save-dir", str(folder / "adapter")]
    with (folder / "stderr.txt").open("w+", encoding="utf-8") as errors:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment() | {"XDG_CACHE_HOME": str(cache)}, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout is not None
        moments: list[tuple[float, dict[str, Any]]] = []
        with process.stdout:
            for line in process.stdout:
                moment_s, event = time.perf_counter() - started_s, json.loads(line)
                moments.append((moment_s, event))
                if event.get("event") == "StepDone" and event["step"] == 1:
                    process.send_signal(signal.SIGTERM)
        process.wait()
        errors.seek(0)
        found = read_moments(moments)
        if found is None:
            raise SystemExit(f"{' '.join(command)} ended without a step:\n{errors.read()}")
    return found


def read_moments(moments: list[tuple[float, dict[str, Any]]]) -> dict[str, Any] | None:
    """Return the figures of a run from its events and the seconds at which they came; None if no step was done."""
    ends_s: dict[str, float] = {}
    current = "start Python"
    facts: dict[str, Any] = {}
    for moment_s, event in moments:
        kind = event.get("event")  # how the run ended is told without one
        if kind not in {"Phase", "RunStarted", "Validated", "StepDone"}:
            continue
        ends_s[current] = round(moment_s, 3)
        if kind == "Phase":
            current = event["name"]
        elif kind == "RunStarted":
            facts["device"] = event["device"]
            current = "validate" if event["validates_first"] else "first step"
        elif kind == "Validated":
            current = "first step"
        else:
            notices = [event["text"] for _, event in moments if event.get("event") == "Notice"]
            return facts | {"first_loss": event["loss"], "ends_s": ends_s, "notices": notices}
    return None


def time_imports() -> dict[str, Any]:
    """Return what the imports of a run take by package, in a process of their own."""
    completed = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", IMPORT_AS_TRAIN_DOES],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    by_package: collections.Counter[str] = collections.Counter()
    for own_us, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", completed.stderr, re.MULTILINE):
        by_package[name.partition(".")[0]] += int(own_us)
    found: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return found | {
        "sum_s": round(by_package.total() / 1e6, 3),
        "largest_s": {name: round(own_us / 1e6, 3) for name, own_us in by_package.most_common(15)},
    }


def environment() -> dict[str, str]:
    """Return the environment of the processes: this checkout's dsft, and the wait policy that it chooses."""
    paths = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    return {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    main()
