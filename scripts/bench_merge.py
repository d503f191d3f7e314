"""Merge a rank-64 adapter into a model with `dsft merge` and with PEFT, and write down time and peak memory of both.

python scripts/bench_merge.py --model DIR --work DIR --out docs/benchmarks/merge-6.7b.json

Each merge is a process of its own; its peak is the kernel's VmHWM, pages of mapped files included. The model's files
are read once before, so that all find them in the page cache alike. `--model` needs safetensors and room for three
copies of it in `--work`.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsft.core.models.weight_files import open_model_weights
from dsft.merge.shards import Shard, ShardLayout, lay_out, write_shard
from dsft.merge.weights import MergedTensor

RANK = 64

IDLE = "import dsft.cli.app, torch"

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device})
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, max_shard_size="5GB")
"""

TELL_PEAK = """
import atexit, sys
def tell():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print("VmHWM", line.split()[1], file=sys.stderr)
atexit.register(tell)
"""


def run_python(code: str, *arguments: str) -> dict[str, float | str]:
    """Run Python code as a process; return its seconds, its peak resident bytes and its output."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", TELL_PEAK + code, *arguments], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{code}\n{done.stderr}")
    peak = next(line for line in done.stderr.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak_bytes": int(peak.split()[1]) * 1024, "output": done.stdout}


def run_merge(base: Path, adapter: Path, out: Path, *flags: str) -> dict[str, object]:
    """Run `dsft merge`; return its figures, with the whole process's seconds and peak."""
    arguments = ["merge", str(adapter), "--base", str(base), "--output", str(out), "--json", *flags]
    run = run_python("from dsft.cli.app import main; sys.exit(main(sys.argv[1:]))", *arguments)
    result = json.loads(str(run.pop("output")).splitlines()[-1])
    return run | {key: result[key] for key in ("merge_s", "verify_s", "gguf_s", "update_kept", "verification")}


def write_adapter(model: Path, folder: Path) -> None:
    """Write an adapter of all linear layers of a Llama, with updates as large as after a fine-tune."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv_size = hidden // heads * kv_heads
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv_size),
        "self_attn.v_proj": (hidden, kv_size),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (num_inputs, num_outputs) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, num_inputs, generator=generator) * num_inputs**-0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(num_outputs, RANK, generator=generator) * 1e-3
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [name.partition(".")[2] for name in sizes],
        "base_model_name_or_path": str(model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def divide(model: Path, folder: Path, shares: list[float]) -> None:
    """Write a model again with its weights divided into files of these shares."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix in {".json", ".jinja", ".model", ".txt"} and "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    with open_model_weights(model, str(model)) as weights:
        tensors = [MergedTensor(name, weights.shape(name)) for name in weights.tensors]
        total = lay_out(tensors, "bfloat16").num_bytes
        groups: list[list[MergedTensor]] = [[] for _ in shares]
        done, index = 0, 0
        for tensor in tensors:
            if done >= total * sum(shares[: index + 1]) - 1 and index + 1 < len(shares):
                index += 1
            groups[index].append(tensor)
            done += weights.tensors[tensor.name].num_bytes
        names = [f"model-{i:05}-of-{len(shares):05}.safetensors" for i in range(1, len(shares) + 1)]
        names = names if len(shares) > 1 else ["model.safetensors"]
        shards = tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True))
        layout = ShardLayout(shards, "bfloat16")
        for shard in shards:
            pieces = (weights.read(tensor.name).to(torch.bfloat16) for tensor in shard.tensors)
            for _ in write_shard(folder, shard, layout, pieces):
                pass
        layout.write_index(folder)


def read_all(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def count_differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Compare two merged models weight by weight."""
    different = total = 0
    greatest = 0.0
    with open_model_weights(ours, "ours") as own, open_model_weights(theirs, "theirs") as other:
        for name in own.tensors:
            a, b = own.read(name), other.read(name)
            unequal = a.view(torch.int16) != b.view(torch.int16)
            different += int(unequal.sum())
            total += a.numel()
            if unequal.any():
                greatest = max(greatest, float((a.float() - b.float()).abs().max()))
    return {"weights": total, "different": different, "greatest_difference": greatest}


def main() -> None:
    """Run all merges and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    adapter, ours, theirs = given.work / "adapter", given.work / "ours", given.work / "theirs"
    write_adapter(given.model, adapter)
    read_all(given.model)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: list[dict[str, object]] = []

    def note(what: str, row: dict[str, object]) -> None:
        row.pop("output", None)
        rows.append({"what": what} | row)
        write_report(given, rows)
        print(json.dumps(rows[-1]), flush=True)

    note("idle, torch loaded", run_python(IDLE))
    for repeat in range(given.repeats):
        for device in devices:
            shutil.rmtree(ours, ignore_errors=True)
            note(f"dsft, {device}", run_merge(given.model, adapter, ours, "--device", device, "--no-verify"))
            shutil.rmtree(theirs, ignore_errors=True)
            peft_device = "cuda:0" if device == "cuda" else "cpu"
            note(f"PEFT, {device}", run_python(PEFT, str(given.model), str(adapter), str(theirs), peft_device))
            if repeat == 0:
                note(f"dsft against PEFT, {device}", dict(count_differences(ours, theirs)))
    shutil.rmtree(theirs, ignore_errors=True)
    for device in devices:
        shutil.rmtree(ours)
        note(f"dsft, {device}, verified", run_merge(given.model, adapter, ours, "--device", device))
    if "cuda" in devices:
        shutil.rmtree(ours)
        flags = ("--device", "cuda", "--base-rounding", "nf4", "--no-verify")
        note("dsft, cuda, into the NF4 round trip", run_merge(given.model, adapter, ours, *flags))
    for kind in ("f16", "q8_0"):
        shutil.rmtree(ours)
        note(f"dsft, cpu, with GGUF {kind}", run_merge(given.model, adapter, ours, "--no-verify", "--gguf", kind))
    for name, shares in {"one file": [1.0], "74/26": [0.74, 0.26], "five files": [0.2] * 5}.items():
        shutil.rmtree(ours, ignore_errors=True)
        divide(given.model, given.work / "divided", shares)
        note(f"dsft, cpu, {name}", run_merge(given.work / "divided", adapter, ours, "--no-verify", "--force"))


def write_report(given: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Write the figures so far as JSON, and as a table beside it."""
    facts = {
        "packages": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "python": platform.python_version(),
        "num_cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "model_bytes": sum(path.stat().st_size for path in given.model.glob("*.safetensors")),
        "rank": RANK,
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(f"{json.dumps(facts, indent=1)}\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(render(facts), encoding="utf-8")


def render(facts: dict[str, Any]) -> str:
    """Return the figures as a table."""
    rows: list[dict[str, Any]] = facts["rows"]
    idle = next(row["peak_bytes"] for row in rows if "idle" in row["what"])
    lines = [
        "| what | whole process | merged and on disk | GGUF | verified | peak memory | above idle |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "seconds" in row:
            parts = [f"{row[key]:.1f} s" if row.get(key) else "" for key in ("merge_s", "gguf_s", "verify_s")]
            peak, above = row["peak_bytes"] / 2**20, (row["peak_bytes"] - idle) / 2**20
            cells = [row["what"], f"{row['seconds']:.1f} s", *parts, f"{peak:,.0f} MiB", f"{above:,.0f} MiB"]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for row in rows:
        if "different" in row:
            lines.append(
                f"{row['what']}: {row['different']:,} of {row['weights']:,} weights differ, "
                f"by at most {row['greatest_difference']:.1e}.\n"
            )
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    lines.append(f"{facts['num_cpus']} cores, {facts['gpu'] or 'no GPU'}, Python {facts['python']}, {packages}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
