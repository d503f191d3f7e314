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
OTHER_CALL = "\\*"
"""Marks a ratio whose two sides ran in different calls."""


def join(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return several records of one kind of GPU as one, in which each run names its call ("session")."""
    gpus = {str(record["gpu"].get("name")) for record in records}
    if len(gpus) > 1:
        raise SystemExit(f"the records are of different GPUs: {', '.join(sorted(gpus))}")
    joined = {key: value for key, value in records[0].items() if key != "command"}
    joined |= {"commands": [], "runs": []}
    for record in records:
        first = len(joined["commands"])
        joined["commands"] += record["commands"] if "commands" in record else [record["command"]]
        joined["runs"] += [run | {"session": first + run.get("session", 0)} for run in record["runs"]]
    return joined


def render(record: dict[str, Any]) -> str:
    """Return a record as Markdown: a table for each row, then the device and the versions."""
    runs = record["runs"]
    lines: list[str] = []
    for name in dict.fromkeys(run["row"] for run in runs if run["side"] != "ceiling"):
        of_row = [run for run in runs if run["row"] == name]
        lines += [f"**{describe_row(name, of_row)}**", "", line(HEAD), line(["---"] * len(HEAD))]
        lines += [line(cells_of(run, runs)) for run in of_row]
        lines.append("")
    if any(OTHER_CALL in text for text in lines):
        lines += [f"{OTHER_CALL} The two sides ran in different calls.", ""]
    for ceiling in (run for run in runs if run["side"] == "ceiling" and run["status"] == "done"):
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


def cells_of(run: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    """Return the cells of a run."""
    name = NAMES[run["side"]]
    if "tok_per_s" not in run:
        reason = str(run.get("reason") or run["status"]).partition("\n")[0][:120].replace("|", "/")
        return [name, describe_micro_batch(run), f"{run['status'].replace('_', ' ')}: {reason}", *[""] * 5]
    ratio = "" if run["side"] == "engine" else describe_ratio(run, runs)
    share = ceiling_share(run, runs)
    return [
        name,
        describe_micro_batch(run),
        f"{run['tok_per_s']:,.0f}",
        f"{run['step_s']:.3f} s",
        ratio,
        "" if share is None else f"{share:.1%}",
        gib(run.get("reserved_bytes")),
        gib(run.get("device_step_peak_bytes")),
    ]


def describe_ratio(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return how many times as fast the engine was; marked where it ran in another call."""
    engine = find_engine(run, runs)
    if engine is None:
        return ""
    mark = "" if is_same_call(engine, run) else OTHER_CALL
    return f"{engine['tok_per_s'] / run['tok_per_s']:.2f} ×{mark}"


def find_engine(run: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the engine's run of the same row, that of the same call if there is one."""
    of_row = [
        other for other in runs if other["row"] == run["row"] and other["side"] == "engine" and "tok_per_s" in other
    ]
    return min(of_row, key=lambda other: not is_same_call(other, run), default=None)


def find_best(row: str, side: str, runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return a side's fastest run of a row."""
    found = [run for run in runs if run["row"] == row and run["side"] == side and "tok_per_s" in run]
    return max(found, key=lambda run: run["tok_per_s"], default=None)


def ceiling_share(run: dict[str, Any], runs: list[dict[str, Any]]) -> float | None:
    """Return a run's useful operations by the ceiling of its call; None if that was not measured."""
    ceilings = (other for other in runs if other["side"] == "ceiling" and other["status"] == "done")
    ceiling = next((other for other in ceilings if is_same_call(other, run)), None)
    if ceiling is None:
        return None
    share: float = run["tok_per_s"] * ceiling["useful_flops_per_token"] / ceiling["ceiling_flops"]
    return share


def is_same_call(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two runs are of one call of `bench_engine.py`."""
    return bool(one.get("session", 0) == other.get("session", 0))


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
