"""The sides of `bench_engine.py` that run on dsft's packages, one a process: job file in, result file out.

"engine" and "plain" are `dsft bench` with `engine: auto` and `engine: off`; "seed" is its plain transformers + peft
baseline; "ceiling" times the matrix products alone; "texts" writes dsft's samples for other trainers.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

Job = dict[str, Any]

CEILING_TOKENS = 4096


def main(run: Callable[[Job], dict[str, Any]]) -> None:
    """Run a job and write what came of it, a failure too.

    Args:
        run: Takes the job, returns its result.
    """
    job_file, result_file = Path(sys.argv[1]), Path(sys.argv[2])
    job = json.loads(job_file.read_text(encoding="utf-8"))
    try:
        result = {"status": "done"} | run(job)
    except Exception as error:
        traceback.print_exc()
        is_memory = type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()
        status = "out_of_memory" if is_memory else "failed"
        result = {"status": status, "reason": f"{type(error).__name__}: {str(error).strip()[:600]}"}
    result_file.write_text(json.dumps(result), encoding="utf-8")


def run_side(job: Job) -> dict[str, Any]:
    """Run a side."""
    from dsft.core.models.device import choose_allocator

    choose_allocator()
    sides = {"ceiling": run_ceiling, "texts": run_texts, "seed": run_seed, "engine": run_dsft, "plain": run_dsft}
    return sides[job["side"]](job)


def make_row(job: Job, **settings: object) -> Any:
    """Return the row of `dsft bench` that a job describes; settings of the job itself come last."""
    from dsft.bench.rows import BenchRow
    from dsft.core.config.load import load_train_config

    flags: dict[str, object] = {"model_name": job["model"], "vram": job["vram_gib"], **settings}
    if job["kind"] in ("real", "packed"):
        flags |= {
            "dataset": job["dataset"],
            "validation_split": 0,
            "over_length": "truncate",
            "bad_rows": "skip",
            "loss_on": job["loss_on"],
            "packing": job["kind"] == "packed",
        }
    return BenchRow(job["side"], load_train_config(job["preset"], None, flags | job["settings"]))


def run_dsft(job: Job) -> dict[str, Any]:
    """Run `dsft bench` on one row, with the engine or without."""
    from dsft.bench.options import BenchOptions, BenchSink, Progress
    from dsft.bench.run import run_bench

    began_s = time.time()
    times: dict[str, float] = {}

    def see(progress: Progress) -> None:
        if progress.phase == "measure" and progress.step == 1:
            times["begin"] = time.time()
        if progress.phase == "measure" and progress.step == job["num_warmup_steps"] + 1:
            times["first"] = time.time()

    options = BenchOptions(
        num_steps=job["num_steps"],
        num_warmup_steps=job["num_warmup_steps"],
        ceiling_s=0.0,
        is_profiled=job["is_profiled"],
        use_random=job["kind"] == "full",
    )
    sink = BenchSink(see, lambda _row: times.setdefault("last", time.time()), lambda _result: None)
    row = make_row(job, engine="auto" if job["side"] == "engine" else "off")
    result = run_bench([row], options, sink)
    found = asdict(result.rows[0])
    speed, measured = found.pop("speed"), found["measured"] or {}
    if speed is None:
        return found | {"versions": result.versions}
    return found | {
        "versions": result.versions,
        "ready_s": times["begin"] - began_s,
        "first_step_s": times["first"],
        "last_step_s": times["last"],
        "steps": speed["steps"],
        "allocated_bytes": measured.get("allocated_bytes"),
        "reserved_bytes": measured.get("reserved_bytes"),
    }


def run_seed(job: Job) -> dict[str, Any]:
    """Run the recipe that transformers, peft and bitsandbytes alone make of the configuration."""
    from dsft.bench.measure import StepClock
    from dsft.bench.memory import MemoryMeter
    from dsft.bench.plain import load_plain, measure_plain
    from dsft.bench.setup import prepare_row
    from dsft.core.models.device import limit_allocator, resolve_device
    from dsft.core.versions import versions
    from dsft.train.planning import look_at_card

    view = look_at_card(resolve_device("auto"))
    num_steps, num_warmup_steps = job["num_steps"], job["num_warmup_steps"]
    setup = prepare_row(
        make_row(job),
        view,
        num_steps + num_warmup_steps,
        use_random=job["kind"] == "full",
        on_rows=lambda _num_rows: None,
    )
    if view is not None:
        paged_bytes = 8 * setup.shape.num_lora_weights(setup.config.lora_r)
        context_bytes = view.context_bytes or view.card.context_bytes
        limit_allocator(job["budget_bytes"] - context_bytes - paged_bytes)
    meter = MemoryMeter(is_gpu=setup.is_gpu, reader=view.reader if view is not None else None)
    base = load_plain(setup)
    times: list[float] = []
    clock = StepClock(setup.is_gpu, num_warmup_steps, meter, lambda _step: times.append(time.time()))
    meter.reset()
    steps = measure_plain(base, setup, num_steps, clock)
    last_s, peak = time.time(), meter.peak()
    return {
        "versions": versions(),
        "config": setup.config.model_dump(),
        "micro_batch": setup.config.per_device_train_batch_size,
        "first_step_s": times[num_warmup_steps],
        "last_step_s": last_s,
        "steps": [asdict(step) for step in steps],
        "allocated_bytes": peak.allocated_bytes if peak is not None else None,
        "reserved_bytes": peak.reserved_bytes if peak is not None else None,
    }


def run_ceiling(job: Job) -> dict[str, Any]:
    """Time the model's own matrix products alone."""
    import torch

    from dsft.bench.ceiling import list_products, measure_ceiling
    from dsft.bench.figures import count_useful_flops
    from dsft.core.memory.model_shape import read_model_shape
    from dsft.core.models.source import find_model

    source = find_model(job["model"])
    shape = read_model_shape(source.model_config, source.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = measure_ceiling(shape, CEILING_TOKENS, torch.bfloat16, device, job["ceiling_s"])
    return {
        "ceiling_flops": ceiling,
        "useful_flops_per_token": count_useful_flops(shape, 1, 1),
        "products": list_products(shape, CEILING_TOKENS),
        "seconds": job["ceiling_s"],
    }


def run_texts(job: Job) -> dict[str, Any]:
    """Write the samples as text, one JSON object a line, in the order in which dsft's first epoch visits them."""
    from dsft.bench.data import prepare_row_data
    from dsft.core.models.source import find_model
    from dsft.core.models.tokenizer import load_tokenizer
    from dsft.train.batches import order_of_epoch

    row = make_row(job | {"kind": "real"})
    source = find_model(row.config.model_name)
    tokenizer: Any = load_tokenizer(source).tokenizer
    data = prepare_row_data(row, source, 1, use_random=False, on_rows=lambda _num_rows: None)
    num_tokens = 0
    with Path(job["texts"]).open("w", encoding="utf-8") as file:
        for index in order_of_epoch(len(data.sequences), row.config.seed, 0):
            [sample] = data.sequences[int(index)]
            ids = sample.token_ids.tolist()
            num_tokens += len(ids)
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            file.write(json.dumps({"text": text, "num_tokens": len(ids)}) + "\n")
    return {"num_samples": len(data.sequences), "num_tokens": num_tokens}


if __name__ == "__main__":
    main(run_side)
