"""The record of `bench_engine.py` as Markdown tables."""

from typing import Any

GIB = 2**30
NAMES = {
    "engine": "dsft, engine",
    "plain": "dsft, plain path",
    "unsloth": "Unsloth",
    "seed": "transformers + peft + bitsandbytes",
}
HEAD = ("", "micro-batch", "tok/s", "step", "dsft's engine by it", "of the ceiling", "reserved", "device")


def render(record: dict[str, Any]) -> str:
    """Return a record as Markdown: a table for each row, then the device and the versions."""
    runs = record["runs"]
    ceiling = next((run for run in runs if run["side"] == "ceiling" and run["status"] == "done"), None)
    lines: list[str] = []
    for name in dict.fromkeys(run["row"] for run in runs if run["side"] != "ceiling"):
        of_row = [run for run in runs if run["row"] == name]
        lines += [f"**{describe_row(name, of_row)}**", "", line(HEAD), line(["---"] * len(HEAD))]
        lines += [line(cells_of(run, of_row, ceiling)) for run in of_row]
        lines.append("")
    if ceiling is not None:
        lines += [f"Ceiling: {ceiling['ceiling_flops'] / 1e12:,.0f} TFLOP/s over {ceiling['seconds']:g} s.", ""]
    gpu = record["gpu"]
    device = f"{gpu['name']}, driver {gpu['driver']}" if gpu else "no GPU"
    lines.append(f"{device}, {record['num_cpus']} cores, Python {record['python']}.")
    for side, shown in NAMES.items():
        packages = next((run["versions"] for run in runs if run["side"] == side and run.get("versions")), None)
        if packages is not None:
            lines.append(f"{shown}: {', '.join(f'{name} {number}' for name, number in packages.items())}.")
    return "\n".join(lines) + "\n"


def describe_row(name: str, runs: list[dict[str, Any]]) -> str:
    """Return what a row trains on."""
    run = next((run for run in runs if "kind" in run), None)
    if run is None:
        return name
    batch, length = run["effective_batch"], run["length"]
    what = {
        "full": f"{batch} full sequences of {length:,} tokens a step",
        "real": f"{batch} real samples a step",
        "packed": f"{batch} packed sequences of {length:,} tokens a step",
    }[run["kind"]]
    return f"{name}: {run['preset']}, rank {run['rank']}, {what}, card of {run['vram_gib']:g} GiB"


def cells_of(run: dict[str, Any], of_row: list[dict[str, Any]], ceiling: dict[str, Any] | None) -> list[str]:
    """Return the cells of a run."""
    name = NAMES[run["side"]]
    if "tok_per_s" not in run:
        reason = str(run.get("reason") or run["status"]).partition("\n")[0][:120].replace("|", "/")
        return [name, describe_micro_batch(run), f"{run['status'].replace('_', ' ')}: {reason}", *[""] * 5]
    engine = next((other for other in of_row if other["side"] == "engine" and "tok_per_s" in other), None)
    ratio = f"{engine['tok_per_s'] / run['tok_per_s']:.2f} ×" if engine is not None and engine is not run else ""
    share = ""
    if ceiling is not None:
        share = f"{run['tok_per_s'] * ceiling['useful_flops_per_token'] / ceiling['ceiling_flops']:.1%}"
    return [
        name,
        describe_micro_batch(run),
        f"{run['tok_per_s']:,.0f}",
        f"{run['step_s']:.3f} s",
        ratio,
        share,
        gib(run.get("reserved_bytes")),
        gib(run.get("device_step_peak_bytes")),
    ]


def describe_micro_batch(run: dict[str, Any]) -> str:
    """Return how a step is split."""
    plan = run.get("plan")
    if plan:
        return f"{plan['micro_batch_tokens']:,} tokens, {plan['num_recomputed']} of {plan['num_blocks']} recompute"
    if "micro_batch" not in run:
        return ""
    return f"{run['micro_batch']} × {run['length']:,}" if run.get("kind") != "real" else f"{run['micro_batch']} samples"


def gib(num_bytes: int | None) -> str:
    """Return bytes for people."""
    return "" if num_bytes is None else f"{num_bytes / GIB:.1f} GiB"


def line(cells: Any) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"
