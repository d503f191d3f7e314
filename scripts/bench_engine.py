r"""Measure training on one GPU: dsft's engine, its plain path, Unsloth and the usual recipe, one process after another.

    python scripts/bench_engine.py --model ./m67 --dataset codealpaca-6k.jsonl --peers-path ./peers --out engine.json
    python scripts/bench_engine.py ... --rows full --sides engine,plain,unsloth,seed --unsloth-micro-tokens 4096,8192
    python scripts/bench_engine.py --table engine.json
    python scripts/bench_engine.py --table engine*.json --keep docs/benchmarks/engine-6.7b-h100.json \
        --write docs/benchmarks/engine.md README.md README.pt-BR.md

Every side trains the same model on the same tokens with the same rank, effective batch and optimizer, held to a card of
the same size. Rates are medians over the steps after warm-up, each step from the end of the one before to the end of
its last kernel, in tokens that are not padding. Unsloth's packages lie in a folder of their own (--peers-path).
The ceiling is the model's own linear layers and head at 4,096 tokens, random bf16 values, forward and backward.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_engine_pages
import bench_engine_table
import pynvml

from dsft.core.config.load import load_train_config
from dsft.core.config.schema import TrainConfig
from dsft.core.memory.cards import KERNELS_BYTES, card_of_memory

SCRIPTS = Path(__file__).resolve().parent
SIDES = ("engine", "plain", "unsloth", "seed")
SAMPLING_S = 0.05
LEAST_S = 25.0
"""A side is not begun with less time left."""

KEPT_CHARACTERS, SHOWN_CHARACTERS = 6000, 1500
"""Of the end of a failed side's log: in the record, on the screen."""


@dataclass(frozen=True)
class Row:
    """What all sides of a row train on.

    Attributes:
        preset: Rank, length and effective batch.
        kind: "full" sequences of random tokens, "real" samples, or real samples "packed"; "ceiling" trains nothing.
        num_warmup_steps: Steps before those that count.
        num_steps: Steps that count.
        vram_gib: Size of the card that every side is held to.
        micro_batches: What Unsloth tries in turn until one fits; empty: as the options say.
    """

    preset: str
    kind: str
    num_warmup_steps: int
    num_steps: int
    vram_gib: float = 24.0
    micro_batches: tuple[int, ...] = ()


ROWS = {
    "ceiling": Row("balanced", "ceiling", 0, 0),
    "full": Row("balanced", "full", 3, 8),
    "real": Row("balanced", "real", 10, 25),
    "packed": Row("balanced", "packed", 10, 12),
    "conservative-full": Row("conservative", "full", 5, 15),
    "conservative-real": Row("conservative", "real", 10, 25),
    "quality-full": Row("quality", "full", 1, 4),
    "quality-real": Row("quality", "real", 10, 25),
    "card-12": Row("balanced", "full", 2, 6, 12.0, (8, 4, 2, 1)),
    "card-8": Row("balanced", "full", 2, 6, 8.0, (4, 2, 1)),
}

SEED_STEPS = (1, 2)
"""Warm-up and measured steps of the usual recipe, whose steps are long and alike."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the base model")
    parser.add_argument("--dataset", type=Path, help="JSONL of instruction, input, output; for real and packed rows")
    parser.add_argument("--peers-path", type=Path, help="folder of Unsloth's packages")
    parser.add_argument("--out", type=Path, help="write everything that was found here, after each side")
    parser.add_argument("--rows", default="ceiling,full,real,packed", help=f"all, or some of {', '.join(ROWS)}")
    parser.add_argument("--sides", default="engine,unsloth", help=f"some of {', '.join(SIDES)}")
    parser.add_argument("--steps", type=int, help="measured steps of every row")
    parser.add_argument("--packed-steps", type=int, help="measured steps of packed rows")
    parser.add_argument("--warmup-steps", type=int, help="steps before those, of every row")
    parser.add_argument("--loss-on", default="all", choices=["all", "response"], help="dsft; Unsloth: always all")
    parser.add_argument("--unsloth-micro-tokens", default="8192", help="tokens of Unsloth's micro-batches, one or more")
    parser.add_argument("--unsloth-checkpointing", default="unsloth", choices=["unsloth", "true", "false"])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="setting of dsft train")
    parser.add_argument("--profile", action="store_true", help="record where a step of dsft's sides spends its time")
    parser.add_argument("--ceiling-seconds", type=float, default=5.0)
    parser.add_argument("--side-seconds", type=float, default=200.0, help="a process that takes longer is ended")
    parser.add_argument("--budget-seconds", type=float, default=570.0, help="what all of it may take")
    parser.add_argument("--table", type=Path, nargs="+", metavar="RESULT", help="only write results as Markdown")
    parser.add_argument("--keep", type=Path, metavar="RECORD", help="with --table: write all results here as one")
    parser.add_argument("--write", type=Path, nargs="+", metavar="PAGE", help="with --table: put tables into pages")
    given = parser.parse_args(arguments)
    given.rows = list(ROWS) if given.rows == "all" else given.rows.split(",")
    given.sides = given.sides.split(",")
    for names, known in ((given.rows, ROWS), (given.sides, SIDES)):
        if unknown := set(names) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    if given.table is None and (given.keep or given.write):
        parser.error("--keep and --write go with --table")
    if given.table is None:
        needed = {"--model": given.model, "--out": given.out}
        if "unsloth" in given.sides and any(ROWS[name].kind != "ceiling" for name in given.rows):
            needed["--peers-path"] = given.peers_path
        if any(ROWS[name].kind in ("real", "packed") for name in given.rows):
            needed["--dataset"] = given.dataset
        if missing := [name for name, value in needed.items() if value is None]:
            parser.error(f"{', '.join(missing)} needed")
    if bad := [each for each in given.set if "=" not in each]:
        parser.error(f"--set {bad[0]}: write NAME=VALUE")
    given.settings = dict(each.split("=", 1) for each in given.set)
    given.micro_tokens = [int(number) for number in given.unsloth_micro_tokens.split(",")]
    return given


def choose_row(name: str, given: argparse.Namespace) -> Row:
    """Return a row with the numbers of steps that were asked for."""
    row = ROWS[name]
    steps = given.packed_steps if row.kind == "packed" and given.packed_steps else given.steps
    if steps is not None:
        row = replace(row, num_steps=steps)
    if given.warmup_steps is not None:
        row = replace(row, num_warmup_steps=given.warmup_steps)
    return row


class DeviceMeter:
    """Samples the memory in use on the first GPU, as NVML sees it, in a thread of its own."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        self._is_over = threading.Event()
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError:
            self._handle = None

    def read(self) -> int | None:
        """Return the bytes in use now; None without a GPU."""
        return None if self._handle is None else int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def describe(self) -> dict[str, Any]:
        """Return what the GPU is; empty without one."""
        if self._handle is None:
            return {}
        return {
            "name": str(pynvml.nvmlDeviceGetName(self._handle)),
            "total_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total),
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000,
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample for as long as the block runs."""
        self._samples = []
        self._is_over.clear()
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    def peak(self, since_s: float = 0.0, until_s: float = float("inf")) -> int | None:
        """Return the most that was seen between two times."""
        return max((used for moment, used in self._samples if since_s <= moment <= until_s), default=None)

    def _run(self) -> None:
        while not self._is_over.wait(SAMPLING_S):
            used = self.read()
            if used is None:
                return
            self._samples.append((time.time(), used))


class Session:
    """Runs sides one after the other and keeps what they found.

    Args:
        given: The options.
        work: Folder for jobs, logs and texts.
    """

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given = given
        self.work = work
        self.began_s = time.monotonic()
        self.meter = DeviceMeter()
        self.record: dict[str, Any] = {
            "format": 1,
            "command": sys.argv[1:],
            "gpu": self.meter.describe(),
            "num_cpus": os.cpu_count(),
            "python": platform.python_version(),
            "runs": [],
        }

    def run(self) -> None:
        """Run all that was asked for."""
        for name in self.given.rows:
            row = choose_row(name, self.given)
            config = load_train_config(row.preset, None, self.given.settings).config
            if row.kind == "ceiling":
                self._keep(name, row, config, "ceiling", [{}])
                continue
            for side in SIDES:
                if side in self.given.sides:
                    for attempts in self._list_attempts(row, config, side):
                        self._keep(name, row, config, side, attempts)

    def _list_attempts(self, row: Row, config: TrainConfig, side: str) -> list[list[dict[str, Any]]]:
        """Return what is measured of a side; each is a list of ways that are tried until one fits the memory."""
        if side != "unsloth":
            return [[{}]]
        whole = config.effective_batch_size
        if row.micro_batches:
            return [[{"micro_batch": size} for size in row.micro_batches]]
        if row.kind == "real":
            return [[{"micro_batch": whole}]]
        sizes = [max(1, min(whole, tokens // config.max_length)) for tokens in self.given.micro_tokens]
        return [[{"micro_batch": size}] for size in dict.fromkeys(sizes)]

    def _keep(self, name: str, row: Row, config: TrainConfig, side: str, attempts: list[dict[str, Any]]) -> None:
        run: dict[str, Any] = {}
        for attempt in attempts:
            job = self._make_job(row, config, side) | attempt
            if side == "unsloth" and row.kind in ("real", "packed"):
                texts = self._write_texts(row, config)
                if texts["status"] != "done":
                    run = texts
                    break
                job["texts"] = texts["texts"]
            run = {key: job[key] for key in DESCRIBED if key in job} | self._run_process(job)
            if run["status"] != "out_of_memory":
                break
        self.record["runs"].append({"row": name, "side": side} | run)
        self._write()
        shown = f"{run['tok_per_s']:,.0f} tok/s" if "tok_per_s" in run else run.get("reason") or run["status"]
        wall_s = f"{run.get('wall_s', 0.0):.0f} s"
        size = f", micro-batch {run['micro_batch']}" if "micro_batch" in run else ""
        print(f"{name}, {side}{size}: {shown} ({wall_s})", flush=True)
        if run.get("log_tail"):
            print(run["log_tail"][-SHOWN_CHARACTERS:], flush=True)

    def _make_job(self, row: Row, config: TrainConfig, side: str) -> dict[str, Any]:
        given = self.given
        num_warmup_steps, num_steps = SEED_STEPS if side == "seed" else (row.num_warmup_steps, row.num_steps)
        return {
            "side": side,
            "kind": row.kind,
            "preset": row.preset,
            "model": str(given.model.resolve()),
            "dataset": None if given.dataset is None else str(given.dataset.resolve()),
            "vram_gib": row.vram_gib,
            "budget_bytes": card_of_memory(row.vram_gib).usable_bytes,
            "kernels_bytes": KERNELS_BYTES,
            "used_before_bytes": self.meter.read(),
            "num_warmup_steps": num_warmup_steps,
            "num_steps": num_steps,
            "loss_on": given.loss_on,
            "settings": given.settings,
            "is_profiled": given.profile,
            "ceiling_s": given.ceiling_seconds,
            "checkpointing": given.unsloth_checkpointing,
            "rank": config.lora_r,
            "alpha": config.lora_alpha,
            "length": config.max_length,
            "effective_batch": config.effective_batch_size,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "max_grad_norm": config.max_grad_norm,
            "optimizer": config.optimizer,
            "seed": config.seed,
        }

    def _write_texts(self, row: Row, config: TrainConfig) -> dict[str, Any]:
        """Write dsft's samples as text for a trainer that tokenizes by itself, in the order dsft visits them."""
        path = self.work / f"{row.preset}.jsonl"
        result = {"status": "done", "texts": str(path)}
        if path.exists():
            return result
        return self._run_process(self._make_job(row, config, "texts") | {"texts": str(path)}) | {"texts": str(path)}

    def _run_process(self, job: dict[str, Any]) -> dict[str, Any]:
        limit_s = min(self.given.side_seconds, self.given.budget_seconds - (time.monotonic() - self.began_s))
        if limit_s < LEAST_S:
            return {"status": "not_run", "reason": "no time was left"}
        folder = Path(tempfile.mkdtemp(prefix=f"{job['side']}-", dir=self.work))
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        started_s = time.time()
        with (folder / "log").open("wb") as log, self.meter.running():
            process = subprocess.Popen(
                [*command_of(job["side"]), str(folder / "job.json"), str(folder / "result.json")],
                cwd=self.work,
                env=environment_of(job["side"], self.given.peers_path),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            ended = self._wait(process, limit_s)
        log_tail = (folder / "log").read_text(encoding="utf-8", errors="replace")[-KEPT_CHARACTERS:]
        if (folder / "result.json").exists():
            run = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        else:
            run = {"status": "failed", "reason": ended}
        if run["status"] != "done":
            run["log_tail"] = log_tail
        run["wall_s"] = time.time() - started_s
        return run | self._measure(run)

    def _wait(self, process: "subprocess.Popen[bytes]", limit_s: float) -> str:
        try:
            return f"ended with {process.wait(limit_s)} and no result"
        except subprocess.TimeoutExpired:
            return f"still running after {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: what it started ends too
                process.wait()

    def _measure(self, run: dict[str, Any]) -> dict[str, Any]:
        """Return the figures of a run that follow from its steps and from the device's memory."""
        found: dict[str, Any] = {"device_peak_bytes": self.meter.peak()}
        if run.get("steps"):
            found["tok_per_s"] = statistics.median(step["num_tokens"] / step["step_s"] for step in run["steps"])
            found["step_s"] = statistics.median(step["step_s"] for step in run["steps"])
            found["device_step_peak_bytes"] = self.meter.peak(run["first_step_s"], run["last_step_s"])
        return found

    def _write(self) -> None:
        text = json.dumps(self.record, indent=1)
        partial = self.given.out.with_suffix(".part")
        partial.write_text(f"{text}\n", encoding="utf-8")
        partial.replace(self.given.out)


DESCRIBED = (
    "kind",
    "preset",
    "vram_gib",
    "rank",
    "length",
    "effective_batch",
    "micro_batch",
    "num_warmup_steps",
    "loss_on",
)
"""What of a job is kept in the record."""


def command_of(side: str) -> list[str]:
    """Return the command that runs a side; job and result file follow."""
    script = "bench_engine_unsloth.py" if side == "unsloth" else "bench_engine_sides.py"
    return [sys.executable, str(SCRIPTS / script)]


def environment_of(side: str, peers: Path | None) -> dict[str, str]:
    """Return the environment of a side: its packages, and no network."""
    variables = dict(os.environ)
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # packages that are fresh from an archive would compile each time
    if side == "unsloth":
        paths = [str(peers.resolve())] if peers is not None else []
    else:
        given = [str(Path(path).resolve()) for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
        paths = [str(SCRIPTS.parent), *given]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    return (
        variables
        | offline
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "DSFT_DEBUG": "1",  # a failure's traceback goes to the log
        }
    )


def publish(given: argparse.Namespace, show: Callable[[str], None]) -> None:
    """Write results that are there: as a record without folders, into pages, or on the screen."""
    record = bench_engine_table.join([json.loads(path.read_text(encoding="utf-8")) for path in given.table])
    if given.keep is not None:
        text = json.dumps(bench_engine_pages.publish(record), indent=1)
        given.keep.write_text(f"{text}\n", encoding="utf-8")
    if given.write is not None:
        bench_engine_pages.write_pages(record, given.write)
    if given.keep is None and given.write is None:
        show(bench_engine_table.render(record))


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for, or write results as a table."""
    given = parse(arguments)
    show: Callable[[str], None] = print
    if given.table is not None:
        publish(given, show)
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-engine-", ignore_cleanup_errors=True) as work:
        session = Session(given, Path(work))
        session.run()
    show(bench_engine_table.render(session.record))


if __name__ == "__main__":
    main()
