"""Ask a trained model ten held-out tasks of the tiny preset and write the answers down as they came.

dsft train --preset tiny && python scripts/answer_heldout.py --out docs/benchmarks/tiny-answers.md
"""

import argparse
import json
from pathlib import Path

from fenced import fence

from dsft.core.paths import presets_dir
from dsft.infer.config import InferConfig
from dsft.infer.result import InferResult
from dsft.infer.run import run_infer

NUM_TASKS = 10
BASE = "builtin:tiny/model"


def ask(prompt: str, model: str) -> InferResult:
    """Answer a prompt greedily, in the template of the adapter."""
    config = InferConfig(model=model, template="instruction", max_new_tokens=120, device="cpu")
    return run_infer(config, prompt, on_text=lambda _: None, on_notice=lambda _: None)


def describe(task: dict[str, str], base: InferResult, tuned: InferResult) -> str:
    """Return one task with the expected answer and both models' answers in Markdown."""
    verdict = "identical to the expected answer" if tuned.text.strip() == task["output"].strip() else "differs"
    return "\n".join(
        [
            f"## {task['instruction']}\n",
            *([fence(task["input"])] if task.get("input") else []),
            "Expected:\n",
            fence(task["output"]),
            f"Tuned ({verdict}; {tuned.num_new_tokens} tokens, ended by: {tuned.stop_reason}):\n",
            fence(tuned.text),
            f"Base ({base.num_new_tokens} tokens, ended by: {base.stop_reason}; its first line):\n",
            fence(base.text.strip().partition("\n")[0]),
        ]
    )


def main() -> None:
    """Ask evenly spaced held-out tasks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("trained_tiny"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    lines = (presets_dir() / "tiny" / "tasks-heldout.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = [json.loads(line) for line in lines]
    chosen = tasks[:: len(tasks) // NUM_TASKS][:NUM_TASKS]
    summary = json.loads((given.model / "training_summary.json").read_text(encoding="utf-8"))
    first, last = summary["validation_losses"][0][1], summary["validation_losses"][-1][1]
    pages = []
    num_stopped = num_same = 0
    for task in chosen:
        prompt = task["instruction"] + (f"\n\n{task['input']}" if task.get("input") else "")
        base, tuned = ask(prompt, BASE), ask(prompt, str(given.model))
        num_stopped += tuned.stop_reason == "end_token"
        num_same += tuned.text.strip() == task["output"].strip()
        pages.append(describe(task, base, tuned))
    head = (
        "# Ten held-out answers of the tiny preset\n\n"
        f"`dsft train --preset tiny`, then `python scripts/answer_heldout.py --out {given.out}`. Every "
        f"{len(tasks) // NUM_TASKS}th of the {len(tasks)} held-out tasks, none of which was trained on, as they came, "
        "greedy.\n\n"
        f"Response loss on all held-out tasks: {first:.4f} before training, {last:.4f} after "
        f"({1 - last / first:.0%} lower), both of the NF4-quantized model. {num_stopped} of {NUM_TASKS} answers end "
        f"by themselves, {num_same} of {NUM_TASKS} are word for word as expected.\n\n"
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(head + "\n".join(pages), encoding="utf-8")
    print(head)


if __name__ == "__main__":
    main()
