"""Train with dsft's engine and with transformers' own modules and compare the losses of every step; prints JSON.

    python scripts/compare_engine.py --model DIR --dataset codealpaca-6k.jsonl --device cpu --precision fp32 \
        --plot curves.svg > result.json

Each side is a `dsft train` in a process of its own, with the same model, seed, samples and settings:

    plain           --engine off, each sample in a pass of its own (or --samples-a-pass)
    plain_one_pass  --engine off, all samples of a step in one pass
    engine          --engine auto, passes as plain
    packed          --engine auto --packing, all packs of a step in one pass
    float32         --engine off, passes as plain, --precision fp32: only where the others compute in 16 bits

"engine" against "plain" is what the engine changes. "plain_one_pass" against "plain" is the yardstick: the same modules
and the same sums in another order. "packed" against "engine" is what packing changes: rows are chosen and ordered so
that both have the same samples in every step (see compare_engine_data.py), which the numbers of tokens and of target
tokens that the runs told confirm. In 16 bits both paths round, each in its own places; there the distances from
"float32" tell which of them is the nearer one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compare_engine_data import SAMPLES_A_PACK, DataFiles, write_data

from dsft.core.config.schema import TrainConfig

Json = dict[str, Any]

PLAIN, YARDSTICK, ENGINE, PACKED, REFERENCE = "plain", "plain_one_pass", "engine", "packed", "float32"
COMPARISONS = ((ENGINE, PLAIN), (YARDSTICK, PLAIN), (PACKED, ENGINE), (PACKED, PLAIN))
PLOTTED_FROM_REFERENCE = ((ENGINE, REFERENCE), (PLAIN, REFERENCE), (PACKED, ENGINE))
FROM_REFERENCE = tuple((side, REFERENCE) for side in (PLAIN, YARDSTICK, ENGINE, PACKED))
EARLY_STEPS = 10
"""Steps in which differences of the weights, which grow from step to step, are still next to nothing."""


def main() -> None:
    """Train all sides and print the record."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(compare(options, Path(name)), indent=1))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--dataset", required=True, help="file of rows, as for dsft train")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a pack, which two samples fill")
    parser.add_argument("--packs-a-step", type=int, default=1, help="an optimizer step has twice as many samples")
    parser.add_argument("--samples-a-pass", type=int, default=1, help="micro-batch of plain and engine")
    parser.add_argument("--held-out", type=int, default=24, help="samples of the validation loss")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="fp32")
    parser.add_argument("--at-once", type=int, default=1, help="sides that train at the same time")
    parser.add_argument("--plot", type=Path, help="SVG of the curves and their differences")
    return parser.parse_args()


def compare(options: argparse.Namespace, folder: Path) -> Json:
    """Train all sides in a folder and return the record."""
    config = TrainConfig(
        model_name=options.model,
        dataset=options.dataset,
        max_length=options.max_length,
        seed=options.seed,
        bad_rows="skip",
        validation_split=0,
    )
    files = write_data(
        config,
        folder,
        num_steps=options.steps,
        packs_a_step=options.packs_a_step,
        num_held_out=options.held_out,
    )
    arguments = arguments_of_sides(options, files)
    with ThreadPoolExecutor(options.at_once) as pool:
        trained = pool.map(lambda side: train(side, arguments[side], folder), arguments)
        sides = dict(zip(arguments, trained, strict=True))
    check_same_samples(sides)
    record = {
        "script": "scripts/compare_engine.py",
        "settings": {name: value for name, value in vars(options).items() if name not in {"model", "dataset", "plot"}},
        "model": Path(options.model).name,
        "dataset": Path(options.dataset).name,
        "device": sides[PLAIN]["device"],
        "versions": sides[PLAIN]["versions"],
        "comparisons": [compare_sides(sides, *names) for names in choose_comparisons(sides)],
        "tokens_a_step": sides[PLAIN]["num_tokens"],
        "target_tokens_a_step": sides[PLAIN]["num_target_tokens"],
        "sides": {name: {key: side[key] for key in KEPT} for name, side in sides.items()},
    }
    if options.plot is not None:
        draw(record, options.plot)
    return record


def choose_comparisons(sides: dict[str, Json]) -> tuple[tuple[str, str], ...]:
    """Return which sides are compared with which."""
    return COMPARISONS + (FROM_REFERENCE if REFERENCE in sides else ())


KEPT = ("arguments", "blocks", "attention", "step_s_median", "validation_losses", "losses", "grad_norms")


def arguments_of_sides(options: argparse.Namespace, files: DataFiles) -> dict[str, list[str]]:
    """Return the arguments of `dsft train` of each side, without folders."""
    common = ["--model-name", options.model, "--validation-dataset", str(files.validation)]
    common += ["--device", options.device, "--plan", "off"]
    common += ["--no-gradient-checkpointing", "--max-length", str(options.max_length), "--lora-r", str(options.lora_r)]
    common += ["--learning-rate", str(options.learning_rate), "--seed", str(options.seed)]
    common += ["--max-steps", str(options.steps), "--save-steps", str(options.steps)]
    num_samples = SAMPLES_A_PACK * options.packs_a_step
    if num_samples % options.samples_a_pass:
        raise SystemExit(f"a step of {num_samples} samples has no whole number of passes of {options.samples_a_pass}")

    def side(engine: str, dataset: Path, in_pass: int, in_step: int, precision: str = options.precision) -> list[str]:
        passes = ["--per-device-train-batch-size", str(in_pass)]
        passes += ["--gradient-accumulation-steps", str(in_step // in_pass)]
        return ["--engine", engine, "--dataset", str(dataset), *passes, "--precision", precision, *common]

    sides = {
        PLAIN: side("off", files.unpacked, options.samples_a_pass, num_samples),
        ENGINE: side("auto", files.unpacked, options.samples_a_pass, num_samples),
        YARDSTICK: side("off", files.unpacked, num_samples, num_samples),
        PACKED: [*side("auto", files.packed, options.packs_a_step, options.packs_a_step), "--packing"],
    }
    if options.precision != "fp32":
        sides[REFERENCE] = side("off", files.unpacked, options.samples_a_pass, num_samples, "fp32")
    return sides


def train(side: str, arguments: list[str], folder: Path) -> Json:
    """Run `dsft train` and return what it told of its steps."""
    adapter = folder / side / "adapter"
    command = [sys.executable, "-m", "dsft", "train", *arguments, "--json"]
    command += ["--output-dir", str(folder / side / "results"), "--save-dir", str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}{done.stdout[-2000:]}")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [event for event in events if event.get("event") == "StepDone"]
    summary = json.loads((adapter / "training_summary.json").read_text(encoding="utf-8"))
    blocks = summary["techniques"]["blocks"]
    if blocks.startswith("dsft's engine") != (side in {ENGINE, PACKED}):
        raise SystemExit(f"the side {side} ran on {blocks}")
    return {
        "arguments": [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments],
        "blocks": blocks,
        "attention": summary["techniques"]["attention"],
        "device": summary["device"],
        "versions": summary["versions"],
        "step_s_median": summary["step_s_median"],
        "validation_losses": [event["loss"] for event in events if event.get("event") == "Validated"],
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "num_tokens": [step["num_tokens"] for step in steps],
        "num_target_tokens": [step["num_target_tokens"] for step in steps],
    }


def check_same_samples(sides: dict[str, Json]) -> None:
    """Refuse sides whose steps differ in tokens or target tokens: they had other samples."""
    for name, side in sides.items():
        for key in ("num_tokens", "num_target_tokens"):
            if side[key] != sides[PLAIN][key]:
                raise SystemExit(f"the steps of {name} have other samples than those of {PLAIN}: {key} differ")


def compare_sides(sides: dict[str, Json], one: str, other: str) -> Json:
    """Return how far the losses of one side are from those of another; a mean is over steps."""
    gaps = find_gaps(sides[one], sides[other])
    norms = zip(sides[one]["grad_norms"], sides[other]["grad_norms"], strict=True)
    validations = zip(sides[one]["validation_losses"], sides[other]["validation_losses"], strict=True)
    return {
        "of": one,
        "against": other,
        "largest": max(gaps),
        "mean": statistics.fmean(gaps),
        "mean_signed": statistics.fmean(sides[one]["losses"]) - statistics.fmean(sides[other]["losses"]),
        f"largest_of_first_{EARLY_STEPS}": max(gaps[:EARLY_STEPS]),
        "largest_relative_of_grad_norm": max(abs(a - b) / b for a, b in norms),
        "validation_at_start_and_end": [abs(a - b) for a, b in validations],
    }


def find_gaps(one: Json, other: Json) -> list[float]:
    """Return the absolute difference of the losses in each step."""
    return [abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)]


def draw(record: Json, path: Path) -> None:
    """Draw the losses of all sides, and the differences below."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    sides = record["sides"]
    steps = range(1, 1 + len(sides[PLAIN]["losses"]))
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for side, (width, color, style) in LINES.items():
        above.plot(steps, sides[side]["losses"], color=color, linewidth=width, linestyle=style, label=SHOWN[side])
    above.set_ylabel("loss of the step (nats)")
    above.legend(frameon=False, fontsize=8)
    above.set_title(
        f"{record['model']}, {record['device']}, {record['settings']['precision']}", loc="left", fontsize=10
    )
    pairs = PLOTTED_FROM_REFERENCE if REFERENCE in sides else COMPARISONS[:3]
    for (one, other), color in zip(pairs, COLORS_OF_GAPS, strict=True):
        # A difference of exactly nothing has no place on a logarithmic axis.
        gaps = [gap or None for gap in find_gaps(sides[one], sides[other])]
        below.plot(steps, gaps, color=color, linewidth=0.9, label=f"{SHOWN[one]} - {SHOWN[other]}")
    below.set_yscale("log")
    below.set_ylabel("absolute difference")
    below.set_xlabel("optimizer step")
    below.legend(frameon=False, fontsize=8)
    for axes in (above, below):
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.hashsalt": "dsft", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


SHOWN = {
    PLAIN: "plain path",
    YARDSTICK: "plain path, one pass a step",
    ENGINE: "engine",
    PACKED: "engine, packed",
    REFERENCE: "plain path in float32",
}
LINES = {PLAIN: (4.0, "#f2b134", "-"), ENGINE: (2.0, "#2a6fbb", "-"), PACKED: (0.9, "#111111", ":")}
"""Width, color and style: thinner on top of thicker, so that all of those that overlap are seen."""
COLORS_OF_GAPS = ("#2a6fbb", "#8a8a8a", "#b3261e")


if __name__ == "__main__":
    main()
