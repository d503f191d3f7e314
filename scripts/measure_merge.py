"""Fine-tune SmolLM2-135M on a CPU and measure what a merge costs: validation losses of adapter and merged models.

    python scripts/measure_merge.py --model DIR --dataset codealpaca.jsonl --out docs/benchmarks/merge-smollm2.md

All losses go into the JSON file beside the page; the page's tables are made of it, its sentences stay.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from memory_report import format_record, markdown, put_tables
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dsft.core.config.schema import TrainConfig
from dsft.core.data.prepare import prepare_data
from dsft.core.data.samples import Sample
from dsft.core.data.sources import open_source
from dsft.core.models.attention import choose_attention, register_attention
from dsft.core.models.device import resolve_device
from dsft.core.models.load import load_quantized
from dsft.core.models.source import find_model
from dsft.core.models.tokenizer import load_tokenizer
from dsft.core.paths import cache_dir
from dsft.core.units import GIB
from dsft.core.versions import versions
from dsft.merge.config import OutputDtype
from dsft.train.batches import flatten
from dsft.train.loss import sum_target_losses

SETTINGS = {
    "max-samples": "1600",
    "max-length": "512",
    "per-device-train-batch-size": "4",
    "gradient-accumulation-steps": "2",
    "lora-r": "16",
    "validation-split": "0.05",
    "device": "cpu",
    "precision": "fp32",
}
RUNS = {
    "large": {"max-steps": "60", "save-steps": "60", "learning-rate": "5e-4"},
    "small": {"max-steps": "20", "save-steps": "20", "learning-rate": "5e-5"},  # near the rounding of bfloat16
}

TRAINED = "NF4 base + adapter"
BASES = {"none": "16-bit base", "nf4": "NF4 round trip", "nf4-bf16": "NF4 round trip in bf16"}
"""What is merged into; the last is the round trip of a training in bf16, where its base lies on bfloat16's grid."""

CPU = resolve_device("cpu")
ATTENTION = choose_attention(None, CPU, "fp32")

Json = dict[str, Any]


def main() -> None:
    """Train, merge, measure, and write record and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        runs = {name: measure_run(given.model, given.dataset, RUNS[name], Path(work, name)) for name in RUNS}
    write(runs, given.out)


def write(runs: Json, out: Path) -> None:
    """Write the record beside the page and its tables into it; a page that is not there yet becomes tables alone."""
    record = {"versions": versions(), "settings": SETTINGS, **runs}
    tables = make_tables(runs)
    places = "\n".join(f"<!-- table {name} -->\n<!-- end -->\n" for name in tables)
    page = out.read_text(encoding="utf-8") if out.is_file() else places
    out.with_suffix(".json").write_text(format_record(record), encoding="utf-8")
    out.write_text(put_tables(page, tables), encoding="utf-8")


# What is measured


def measure_run(model: str, dataset: str, flags: dict[str, str], work: Path) -> Json:
    """Train an adapter, merge it in every way, and measure the losses of all models that come of it."""
    adapter = work / "trained"
    given = [part for name, value in (SETTINGS | flags).items() for part in (f"--{name}", value)]
    given += ["--model-name", model, "--dataset", dataset, "--save-dir", str(adapter)]
    run_dsft("train", *given, "--output-dir", str(work / "results"), "--no-gradient-checkpointing", "--quiet")
    summary = json.loads((adapter / "training_summary.json").read_text(encoding="utf-8"))
    merges = [merge(adapter, work, *kind) for kind in product(BASES, get_args(OutputDtype))]
    samples = read_validation(summary)
    num_targets = [len(flatten([sample]).labels) for sample in samples]
    losses = {}
    for name, load in find_variants(model, adapter, work):
        losses[name] = [round(loss, 5) for loss in measure_losses(load(), samples)]
        print(f"{work.name}: {name}: {sum(losses[name]) / sum(num_targets):.5f}", file=sys.stderr)
    found, told = sum(losses[TRAINED]) / sum(num_targets), summary["validation_losses"][-1][1]
    if not abs(found - told) < 1e-4:
        raise SystemExit(f"{TRAINED}: training measured a validation loss of {told}, and this script {found}")
    training = {key: summary[key] for key in ("num_steps", "first_loss", "final_loss", "validation_losses")}
    return {"flags": flags, "training": training, "merges": merges, "num_targets": num_targets, "losses": losses}


def run_dsft(*arguments: str) -> str:
    """Run a dsft command and return its standard output."""
    command = [sys.executable, "-m", "dsft", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def merge(adapter: Path, work: Path, base: str, dtype: str) -> Json:
    """Merge in a process of its own and return what is worth keeping of its result."""
    rounding, _, precision = base.partition("-")
    source = record_precision(adapter, work / "trained-bf16", precision) if precision else adapter
    flags = ("--base-rounding", rounding, "--dtype", dtype, "--output", str(work / f"merged-{base}-{dtype}"), "--json")
    result = json.loads(run_dsft("merge", str(source), *flags).splitlines()[-1])
    kept = ("dtype", "update_kept", "merge_s", "verify_s", "peak_host_memory_bytes", "verification")
    return {"base": base} | {key: result[key] for key in kept}


def record_precision(adapter: Path, copy: Path, precision: str) -> Path:
    """Copy an adapter and record another compute type in it, by which merge makes the round trip."""
    path = shutil.copytree(adapter, copy, dirs_exist_ok=True) / "training_summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary["model"]["precision"] = precision
    path.write_text(json.dumps(summary), encoding="utf-8")
    return copy


def read_validation(summary: Json) -> list[Sample]:
    """Return the samples that a run held out, tokenized and masked as it did."""
    config = TrainConfig.model_validate(summary["config"])
    tokenizer = load_tokenizer(find_model(config.model_name))
    data = prepare_data(
        config,
        open_source(config.dataset, split=config.dataset_split, revision=config.dataset_revision),
        tokenizer.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        cache=cache_dir(),
        on_rows=lambda _: None,
    )
    if data.validation is None:
        raise SystemExit("the run held out no samples")
    return [data.validation[index] for index in range(len(data.validation))]


def find_variants(model: str, adapter: Path, work: Path) -> Iterator[tuple[str, Callable[[], torch.nn.Module]]]:
    """Yield every model to measure: its name and what loads it, all with arithmetic in float32."""
    yield "16-bit base", lambda: load_whole(model)
    yield "NF4 base", lambda: load_nf4(model)
    yield TRAINED, lambda: PeftModel.from_pretrained(load_nf4(model), str(adapter))
    yield "16-bit base + adapter", lambda: PeftModel.from_pretrained(load_whole(model), str(adapter))
    for key, base in BASES.items():
        for dtype in get_args(OutputDtype):
            folder = str(work / f"merged-{key}-{dtype}")
            yield f"merged into {base}, {dtype}", lambda folder=folder: load_whole(folder)
    for key, base in BASES.items():
        folder = str(work / f"merged-{key}-bfloat16")
        yield f"merged into {base}, bfloat16, quantized to NF4", lambda folder=folder: load_nf4(folder)


def load_whole(location: str) -> torch.nn.Module:
    """Load a model in float32, with the attention of training."""
    register_attention()
    return AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32, attn_implementation=ATTENTION.name)


def load_nf4(location: str) -> torch.nn.Module:
    """Load a model as training does, its linear layers quantized to NF4."""
    return load_quantized(find_model(location), CPU, "fp32", ATTENTION)


def measure_losses(model: torch.nn.Module, samples: Iterable[Sample]) -> list[float]:
    """Return the summed cross-entropy of each sample's target tokens, in nats; each runs alone, without padding."""
    model.eval()
    with torch.inference_mode():
        return [sum_target_losses(model, flatten([sample])).item() for sample in samples]


# Tables


def make_tables(runs: Json) -> dict[str, str]:
    """Return the tables by name, as Markdown."""
    return {"losses": losses_table(runs), "pairs": pairs_table(runs), "merges": merges_table(runs)}


def losses_table(runs: Json) -> str:
    """Return the validation losses of all models, and their differences from the one that was trained."""
    lines = []
    for name in next(iter(runs.values()))["losses"]:
        cells = [name]
        for run in runs.values():
            cells.append(f"{sum(run['losses'][name]) / sum(run['num_targets']):.5f}")
            cells.append("" if name == TRAINED else compare(run, name, TRAINED))
        lines.append(cells)
    heads = [head for name in runs for head in (f"{name} update: loss", f"minus {TRAINED}")]
    return markdown(("model", *heads), lines)


def pairs_table(runs: Json) -> str:
    """Return the differences that answer one question each."""
    whole, *rounded = (f"merged into {base}" for base in BASES.values())
    pairs = [("NF4 base", "16-bit base"), *((f"{each}, float32", f"{whole}, float32") for each in rounded)]
    for merged in (whole, *rounded):
        pairs += [(f"{merged}, {dtype}", f"{merged}, float32") for dtype in ("bfloat16", "float16")]
    again = "bfloat16, quantized to NF4"
    pairs += [(f"{each}, {again}", f"{whole}, {again}") for each in rounded]
    lines = [[one, other, *(compare(run, one, other) for run in runs.values())] for one, other in pairs]
    return markdown(("loss of", "minus loss of", *(f"{name} update" for name in runs)), lines)


def compare(run: Json, one: str, other: str) -> str:
    """Return the difference of two means over tokens, its standard error over samples, and their ratio in brackets."""
    targets = np.array(run["num_targets"])
    differences = np.array(run["losses"][one]) - np.array(run["losses"][other])
    mean = differences.sum() / targets.sum()
    residuals = differences - mean * targets  # a mean over tokens is a ratio of sums over samples
    error = np.sqrt(len(targets) / (len(targets) - 1) * (residuals**2).sum()) / targets.sum()
    if max(abs(mean), error) < 5e-6:
        return "0"  # float32's own noise
    return f"{mean:+.5f} ± {error:.5f} ({mean / error:+.1f})".replace("-", "−")


def merges_table(runs: Json) -> str:
    """Return what each merge kept, what its verification found, and what it took."""
    heads = ("update", "merged into", "type", "update kept", "logits differ by", "of it by rounding", "not explained")
    heads = (*heads, "mean KL, nats", "same top token", "merge, s", "verify, s", "peak, GiB")
    lines = []
    for name, each in ((name, each) for name, run in runs.items() for each in run["merges"]):
        found = each["verification"]
        differences = ("mean_difference", "rounding_mean_difference", "excess_mean_difference", "mean_kl")
        cells = [name, BASES[each["base"]], each["dtype"], f"{each['update_kept'] * 100:.2f} %"]
        cells += [f"{found[key]:.1e}" for key in differences] + [f"{found['top_token_agreement'] * 100:.1f} %"]
        cells += [f"{each['merge_s']:.1f}", f"{each['verify_s']:.1f}", f"{each['peak_host_memory_bytes'] / GIB:.2f}"]
        lines.append(cells)
    return markdown(heads, lines)


if __name__ == "__main__":
    main()
