"""Predict the measured rows of docs/benchmarks/memory.json with today's arithmetic, and make the tables of memory.md.

    python scripts/memory_report.py                       # print the tables
    python scripts/memory_report.py --write               # write predictions into memory.json, tables into memory.md
    python scripts/memory_report.py --grid grid.json --fresh fresh*.json --presets presets.json --write
    python scripts/memory_report.py --record docs/benchmarks/memory-engine.json --page docs/benchmarks/memory-engine.md

The third form makes memory.json anew from records that `dsft bench --output` wrote; the answers of inference stay.
"""

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dsft.core.memory.cards import H100, find_card
from dsft.core.memory.generation import GenerationLoad, cache_bytes, capacity_for, estimate_generation
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, ModelShape, read_model_shape
from dsft.core.memory.prompt_pass import prompt_bytes
from dsft.core.memory.speed import predict_step
from dsft.core.memory.training import TrainingLoad, estimate_training, optimizer_state_bytes, paged_tensor_bytes
from dsft.core.units import GIB

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
COMMANDS = {
    "grid": "dsft bench --grid memory-grid.yaml --random-data --steps 1 --warmup-steps 0 --ceiling-seconds 0",
    "fresh": "the same with one row in the file",
    "presets": "dsft bench --vram 24 --steps 3 --warmup-steps 1 --ceiling-seconds 2",
}
FIGURES = ("allocated", "reserved", "device")
SETS = ("fitted", "held_out")
EACH_WEIGHT = "one for each weight"
"""What a record says of its optimizer that was measured before LoRA's weights lay in one tensor."""

Json = dict[str, Any]


def main() -> None:
    """Read or make the record, predict, and print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, help="record of the grid's rows in one process")
    parser.add_argument("--fresh", type=Path, nargs="*", default=[], help="records of rows in processes of their own")
    parser.add_argument("--presets", type=Path, help="record of the presets, held to 24 GiB")
    parser.add_argument("--write", action="store_true", help="write the record and the tables of its page")
    parser.add_argument("--record", type=Path, default=FOLDER / "memory.json", help="the record")
    parser.add_argument("--page", type=Path, default=FOLDER / "memory.md", help="the page with its tables")
    options = parser.parse_args()
    path, page = options.record, options.page
    record = read_json(path) if path.exists() else {}
    if options.grid:
        kept = {key: record[key] for key in ("inference_card", "inference") if key in record}
        record = collect(options.grid, options.fresh, options.presets) | kept
    predict_all(record)
    tables = make_tables(record)
    if options.write:
        path.write_text(format_record(record), encoding="utf-8")
        page.write_text(put_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        print("\n\n".join(tables.values()))


def read_json(path: Path) -> Json:
    """Return the object in a JSON file."""
    content: Json = json.loads(path.read_text(encoding="utf-8"))
    return content


# From what dsft bench wrote to what is kept


def collect(grid: Path, fresh: Iterable[Path], presets: Path | None) -> Json:
    """Return what is worth keeping of the records of a measurement."""
    whole = read_json(grid)
    base = BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"]
    record: Json = {
        "device": whole["device"],
        "context_bytes": seen_context_bytes(whole),
        "versions": whole["versions"],
        "commands": COMMANDS,
        "models": {"6.7B": base, "GQA": base | {"num_key_value_heads": 8, "intermediate_size": 14336}},
        **({"uses_engine": True} if on_engine(whole) else {}),
        "grid": [keep(row) for row in whole["rows"]],
        "fresh": [keep(row) for path in fresh for row in read_json(path)["rows"]],
        "presets": [keep(row) for row in read_json(presets)["rows"]] if presets else [],
    }
    return record


def on_engine(bench: Json) -> bool:
    """Return whether dsft's engine computed the blocks of all rows; a record is of one path."""
    kinds = {str(row.get("blocks", "")).startswith("dsft's engine") for row in bench["rows"]}
    if len(kinds) != 1:
        raise SystemExit("the rows are of both paths: a record is of one")
    return kinds.pop()


def seen_context_bytes(bench: Json) -> int:
    """Return the CUDA context the bench predicted with: it measures that at its start and records only the sum."""
    predicted = next(row["predicted"] for row in bench["rows"] if not row["plan"]["pages_optimizer"])
    used_before: int = bench["device"]["used_before_bytes"]
    context: int = predicted["device_bytes"] - predicted["reserved_bytes"] - used_before
    return context


def keep(row: Json) -> Json:
    """Return the facts of a row that its prediction needs, and what was measured."""
    if row["status"] != "done" or not row["data"].startswith("random tokens"):
        raise SystemExit(f"{row['name']}: only rows that were measured on random tokens can be predicted from a record")
    max_length, [first, *_] = row["config"]["max_length"], row["speed"]["steps"]
    num_tokens = max(max_length, min(row["plan"]["micro_batch_tokens"], first["num_tokens"]))
    return {
        "name": row["name"],
        "set": row["set"],
        "model": "GQA" if row["name"].startswith("GQA ") else "6.7B",
        "precision": row["precision"],
        "attention": row["attention"],
        "max_length": max_length,
        "lora_r": row["config"]["lora_r"],
        "plan": {key: row["plan"][key] for key in ("micro_batch_size", "num_recomputed", "pages_optimizer")},
        "num_tokens": num_tokens,
        "num_targets": num_tokens - num_tokens // max_length,  # a sequence's first token has nothing before it
        "num_micro_batches": first["num_micro_batches"],
        "step_s": round(row["speed"]["step_s"]["median"], 4),
        "tok_per_s": round(row["speed"]["tok_per_s"], 1),
        "measured": row["measured"],
        "predicted_then": row["predicted"],
    }


def format_record(record: Json) -> str:
    """Return the record as JSON with one line for each row."""
    parts = []
    for key, value in record.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f' "{key}": [\n{rows}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


# Predictions


def predict_all(record: Json) -> None:
    """Put today's prediction into every row."""
    for name in ("grid", "fresh", "presets"):
        for row in record[name]:
            row["predicted"] = predict(record, row)
    for row in record.get("inference", []):
        row["predicted"] = predict_answer(record, row)


def predict(record: Json, row: Json) -> Json:
    """Predict the peaks of a row on the card as it was found, and the time of a step."""
    device = record["device"]
    card = replace(H100, total_bytes=device["total_bytes"], driver_bytes=device["used_before_bytes"])
    shape = read_model_shape(record["models"][row["model"]], row["model"])
    load = TrainingLoad(
        shape=shape,
        rank=row["lora_r"],
        num_tokens=row["num_tokens"],
        num_targets=row["num_targets"],
        value_bytes={"bf16": 2, "fp16": 2, "fp32": 4}[row["precision"]],
        is_flash="flash" in row["attention"].lower(),
        num_recomputed=row["plan"]["num_recomputed"],
        pages_optimizer=row["plan"]["pages_optimizer"],
        uses_engine=record.get("uses_engine", False),
    )
    memory = estimate_training(load, card, context_bytes=record["context_bytes"])
    time = predict_step(
        shape,
        row["lora_r"],
        card,
        step_tokens=row["num_tokens"] * row["num_micro_batches"],
        num_passes=row["num_micro_batches"],
        num_recomputed=row["plan"]["num_recomputed"],
        paged_bytes=0,  # the card had room for all paged state
    )
    peaks = {f"{figure}_bytes": getattr(memory, f"{figure}_bytes") for figure in FIGURES}
    if load.pages_optimizer and record.get("optimizer_tensors") == EACH_WEIGHT:
        peaks["device_bytes"] += paged_apart_bytes(shape, load.rank) - sum(
            optimizer_state_bytes(shape, load.rank, pages=True)
        )
    return peaks | {"step_s": round(time.step_s, 4)}


def paged_apart_bytes(shape: ModelShape, rank: int) -> int:
    """Return what paged optimizer state takes where each weight has moments of its own, each rounded up."""
    sizes = [rank * size for linear in shape.block_linears for size in (linear.num_inputs, linear.num_outputs)]
    return shape.num_blocks * sum(2 * paged_tensor_bytes(4 * num_values) for num_values in sizes)


def predict_answer(record: Json, row: Json) -> Json:
    """Predict the peak of an answer, or of several at once, as for a prompt of nearly that length."""
    shape = read_model_shape(record["models"][row["model"]], row["model"])
    num_rows, num_tokens = row["num_rows"], row["num_prompt_tokens"] + row["num_new_tokens"]
    rank, is_4bit = row["lora_r"], row["is_4bit"]
    load = GenerationLoad(shape, rank, num_tokens, is_4bit)
    allocated = estimate_generation(load, find_card(record["inference_card"])).allocated_bytes
    # The estimate is of one answer: others have caches of their own, and prompts are read together.
    allocated += (num_rows - 1) * cache_bytes(shape, capacity_for(num_tokens))
    one, all_read = (prompt_bytes(shape, rank, count, is_4bit=is_4bit) for count in (num_tokens, num_rows * num_tokens))
    return {"allocated_bytes": allocated - one + all_read}


def error_percent(row: Json, figure: str, prediction: str = "predicted") -> float:
    """Return by how much a prediction is too high, in percent of what was measured."""
    error: float = (row[prediction][f"{figure}_bytes"] / row["measured"][f"{figure}_bytes"] - 1) * 100
    return error


# Tables


def make_tables(record: Json) -> dict[str, str]:
    """Return the tables by name, as Markdown."""
    grid = record["grid"]
    tables = {"summary": summary_table(grid)}
    tables |= {name: rows_table([row for row in grid if row["set"] == name]) for name in SETS}
    if record["fresh"]:
        tables["fresh"] = fresh_table(grid, record["fresh"])
    if record["presets"]:
        tables["presets"] = presets_table(record["presets"])
    if "inference" in record:
        tables["inference"] = inference_table(record["inference"])
    return tables


def put_tables(page: str, tables: dict[str, str]) -> str:
    """Return a page whose tables, each between two comments, are replaced."""
    for name, table in tables.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, rf"\g<1>{table}\n\g<2>", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"the page has {count} places for the table {name!r}, and not one")
    return page


def summary_table(grid: list[Json]) -> str:
    """Return the errors of each set, with today's constants and with those of the run."""
    lines = []
    for name in SETS:
        rows = [row for row in grid if row["set"] == name]
        for figure in FIGURES:
            now, then = (
                spread([error_percent(row, figure, key) for row in rows]) for key in ("predicted", "predicted_then")
            )
            lines.append([f"{name.replace('_', ' ')}, {len(rows)} rows", figure, *now, *then])
    return markdown(("set", "peak", "mean size", "lowest", "highest", "then: mean size", "lowest", "highest"), lines)


def spread(errors: list[float]) -> list[str]:
    """Return mean size, lowest and highest of errors in percent."""
    return [f"{fmean(map(abs, errors)):.2f} %", signed(min(errors)), signed(max(errors))]


def rows_table(rows: list[Json]) -> str:
    """Return measured against predicted of all rows."""
    lines = [[row["name"], f"{row['step_s']:.2f}", *(compare(row, figure) for figure in FIGURES)] for row in rows]
    return markdown(("run", "step, s", *(f"{figure}, GiB" for figure in FIGURES)), lines)


def compare(row: Json, figure: str) -> str:
    """Return measured, predicted and error in one cell."""
    measured, predicted = (row[key][f"{figure}_bytes"] / GIB for key in ("measured", "predicted"))
    return f"{measured:.2f} / {predicted:.2f} ({signed(error_percent(row, figure))})"


def fresh_table(grid: list[Json], fresh: list[Json]) -> str:
    """Return the rows that were repeated in fresh processes, against the grid's."""
    in_grid = {row["name"]: row for row in grid}
    lines = []
    for row in fresh:
        cells = [row["name"]]
        for figure in ("reserved", "device"):
            one, other = (each["measured"][f"{figure}_bytes"] for each in (in_grid[row["name"]], row))
            cells.append(f"{one / GIB:.2f} / {other / GIB:.2f} ({signed((other / one - 1) * 100)})")
        lines.append([*cells, *(signed(error_percent(row, figure)) for figure in ("reserved", "device"))])
    heads = ("reserved, GiB: grid / fresh", "device, GiB: grid / fresh", "error reserved", "error device")
    return markdown(("run", *heads), lines)


def presets_table(rows: list[Json]) -> str:
    """Return the presets held to 24 GiB."""
    lines = []
    for row in rows:
        plan = row["plan"]
        split = f"{plan['micro_batch_size']} × {row['num_micro_batches']}, {plan['num_recomputed']} of 32 recompute"
        predicted_s = row["predicted"]["step_s"]
        step = f"{row['step_s']:.2f} / {predicted_s:.2f} ({signed((predicted_s / row['step_s'] - 1) * 100)})"
        speed = (f"{row['tok_per_s']:,.0f}", step)
        room = f"{row['measured']['device_bytes'] / 1024**2:,.0f} of 24,576 MiB"
        lines.append([row["name"], split, *speed, compare(row, "reserved"), compare(row, "device"), room])
    heads = ("tok/s", "step, s", "reserved, GiB", "device, GiB", "NVML's peak")
    return markdown(("preset", "plan", *heads), lines)


def inference_table(rows: list[Json]) -> str:
    """Return measured against predicted of answers: a line for each prompt, a column for each kind of model."""
    kinds = {True: "NF4", False: "16 bits"}
    answers: dict[str, dict[str, str]] = {}
    for row in rows:
        texts = "" if row["num_rows"] == 1 else f"{row['num_rows']} of "
        answer = f"{texts}{row['num_prompt_tokens']:,} + {row['num_new_tokens']}"
        kind = kinds[row["is_4bit"]] + (f", rank {row['lora_r']}" if row["lora_r"] else "")
        answers.setdefault(answer, {})[kind] = compare(row, "allocated")
    columns = list(dict.fromkeys(kind for cells in answers.values() for kind in cells))
    lines = [[answer, *(cells.get(kind, "") for kind in columns)] for answer, cells in answers.items()]
    return markdown(("prompt + answer, tokens", *columns), lines)


def signed(percent: float) -> str:
    """Return an error with its sign, a true minus; what rounds to nothing has none."""
    text = f"{percent:+.2f}"
    text = "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")
    return f"{text} %"


def markdown(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    names = list(heads)
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    main()
