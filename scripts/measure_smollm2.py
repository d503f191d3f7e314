"""Fine-tune SmolLM2-135M on CodeAlpaca rows on a CPU and write down losses and answers, before and after.

python scripts/measure_smollm2.py --model DIR --dataset codealpaca.jsonl --out docs/benchmarks/smollm2.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fenced import fence

PROMPTS = (
    "Write a Python function that returns the sum of the squares of a list of numbers.",
    "Write an SQL query that returns the names of all customers older than 30.",
    "Name three ways to reverse a string in JavaScript.",
)
SETTINGS = {
    "max-samples": "800",
    "max-length": "512",
    "max-steps": "40",
    "save-steps": "20",
    "per-device-train-batch-size": "4",
    "gradient-accumulation-steps": "2",
    "lora-r": "16",
    "learning-rate": "5e-4",
    "validation-split": "0.05",
    "device": "cpu",
}


def run_dsft(*arguments: str) -> str:
    """Run a dsft command and return its standard output."""
    command = [sys.executable, "-m", "dsft", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def answer(prompt: str, model: str) -> dict[str, object]:
    """Answer a prompt greedily in the instruction template."""
    return json.loads(
        run_dsft("infer", prompt, "--model", model, "--template", "instruction", "--max-new-tokens", "120", "--json")
    )


def main() -> None:
    """Train, answer, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        adapter = f"{folder}/trained_smollm2"
        paths = ["--output-dir", f"{folder}/results", "--save-dir", adapter]
        run_dsft("train", "--model-name", given.model, "--dataset", given.dataset, *flags, *paths, "--quiet")
        summary = json.loads(Path(adapter, "training_summary.json").read_text(encoding="utf-8"))
        answers = [(prompt, answer(prompt, given.model), answer(prompt, adapter)) for prompt in PROMPTS]
    losses = [loss for _, loss in summary["losses"]]
    lines = [
        "# SmolLM2-135M on CodeAlpaca rows, two CPU cores\n",
        "`dsft train --model-name DIR --dataset codealpaca.jsonl " + " ".join(flags) + "`\n",
        f"{summary['data']['num_samples']} samples, {summary['num_steps']} steps of 8 samples, "
        f"{summary['train_tok_per_s']:.0f} tokens/s, median step {summary['step_s_median']:.2f} s, "
        f"{summary['duration_s']:.0f} s in all with validation. "
        f"Peak resident memory {summary['peak_host_memory_bytes'] / 2**30:.2f} GiB. "
        f"torch {summary['versions']['torch']}, transformers {summary['versions']['transformers']}, "
        f"bitsandbytes {summary['versions']['bitsandbytes']}.\n",
        "| | start | end |\n| --- | --- | --- |",
        f"| training loss (mean of 5 steps) | {sum(losses[:5]) / 5:.4f} | {sum(losses[-5:]) / 5:.4f} |",
        f"| validation loss | {summary['validation_losses'][0][1]:.4f} | {summary['validation_losses'][-1][1]:.4f} |\n",
        "Losses are mean cross-entropy over response tokens, in nats. Answers are greedy, in the template "
        "`### Instruction: ... ### Response:`, which the model had not seen before.\n",
    ]
    for prompt, base, tuned in answers:
        lines += [f"## {prompt}\n"]
        for name, told in (("Base", base), ("With the adapter", tuned)):
            lines += [f"{name} ({told['num_new_tokens']} tokens, ended by {told['stop_reason']}):\n"]
            lines += [fence(str(told["text"]).strip())]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
