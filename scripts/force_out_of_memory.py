"""Take a GPU's memory away in the middle of a run, and compare its losses with those of a run that was left alone.

    python scripts/force_out_of_memory.py MODEL DATASET [--set max_steps=8 ...] [--output result.json]

Two ways: another allocation takes what is free, and the allocator's limit is lowered. The run has to go on under a
smaller plan with the same losses, but for rounding.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsft.core.config.load import load_train_config
from dsft.core.units import format_gib
from dsft.train.events import Event, PlanChanged, StepDone
from dsft.train.run import run_train

DISTURBED_STEP = 3
SHARE_LEFT = 0.4
"""Of what the steps before took above the weights."""


def main() -> None:
    """Run all three and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = {"model_name": options.model, "dataset": options.dataset, "max_steps": "8", "device": "cuda"}
    settings |= dict(setting.split("=", 1) for setting in options.set)
    results = {name: _train(settings, disturb) for name, disturb in DISTURBANCES.items()}
    reference = results["undisturbed"]["losses"]
    for name, result in results.items():
        differences = [abs(a / b - 1) for a, b in zip(result["losses"], reference, strict=True)]
        result["largest_relative_difference"] = max(differences)
        print(f"{name}: losses {' '.join(f'{loss:.4f}' for loss in result['losses'])}; ", end="")
        print(f"largest difference {max(differences):.1e}; plan changes: {result['plan_changes'] or 'none'}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _room_bytes() -> int:
    """Return what the next step may have, and give everything else that PyTorch holds back to the device."""
    room = round(SHARE_LEFT * (torch.cuda.max_memory_reserved() - torch.cuda.memory_allocated()))
    torch.cuda.empty_cache()
    return room


def _take_memory() -> list[torch.Tensor]:
    room = _room_bytes()
    free, _ = torch.cuda.mem_get_info()
    return [torch.empty(max(0, free - room), dtype=torch.uint8, device="cuda")]


def _lower_limit() -> list[torch.Tensor]:
    room = _room_bytes()
    most = torch.cuda.memory_reserved() + room
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    return []


DISTURBANCES: dict[str, Callable[[], list[torch.Tensor]] | None] = {
    "undisturbed": None,
    "another allocation": _take_memory,
    "limit lowered": _lower_limit,
}


def _train(settings: dict[str, str], disturb: Callable[[], list[torch.Tensor]] | None) -> dict[str, Any]:
    held: list[torch.Tensor] = []
    changes: list[str] = []

    def sink(event: Event, /) -> None:
        if isinstance(event, StepDone) and event.step == DISTURBED_STEP and disturb is not None:
            held.extend(disturb())
        if isinstance(event, PlanChanged):
            changes.append(f"step {event.step}: {event.description}")

    with tempfile.TemporaryDirectory() as folder:
        flags = settings | {"output_dir": f"{folder}/results", "save_dir": f"{folder}/trained"}
        result = run_train(load_train_config(flags=flags), resume=False, overwrite=False, sink=sink)
    held.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    print(f"trained, {format_gib(result.peak_memory_reserved_bytes or 0)} reserved at most", flush=True)
    return {
        "losses": [loss for _, loss in result.losses],
        "plan_changes": changes,
        "plan": result.plan,
        "events": [event for event in result.events if event["event"] == PlanChanged.__name__],
        "summary": {
            name: value
            for name, value in dataclasses.asdict(result).items()
            if name.endswith("_bytes") or name == "device"
        },
    }


if __name__ == "__main__":
    main()
