"""The record of `bench_engine.py` as it is published: without folders, in tables of pages, each between two comments.

A page has a place for each table it shows, from `<!-- table NAME -->` to `<!-- end -->`: "engine" is every run, "goals"
what the engine was to reach, "memory" its peaks beside their predictions, "speed" the short one of the READMEs, in the
language of the page.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_engine_table import GIB, ceiling_share, find_best, find_engine, render
from memory_report import markdown, put_tables, signed

SPEED_ROWS = ("full", "real", "packed")
"""Rows of the short table."""

WORDS = {
    "en": {
        "head": ("`balanced`, tokens/s", "dsft", "Unsloth", "the usual recipe", "dsft by Unsloth", "by the recipe"),
        "full": "full sequences",
        "real": "CodeAlpaca rows",
        "packed": "CodeAlpaca rows, packed",
        "none": "not measured",
    },
    "pt-BR": {
        "head": ("`balanced`, tokens/s", "dsft", "Unsloth", "receita usual", "dsft / Unsloth", "dsft / receita"),
        "full": "sequências cheias",
        "real": "registros do CodeAlpaca",
        "packed": "registros do CodeAlpaca, com packing",
        "none": "não medido",
    },
}


@dataclass(frozen=True)
class Goal:
    """What the engine was to reach.

    Attributes:
        row: The row it is measured by.
        what: The row in words.
        beside: The side it is compared with, or "ceiling".
        least: Its rate by that side's, or its share of the ceiling.
    """

    row: str
    what: str
    beside: str
    least: float


GOALS = (
    Goal("full", "full sequences, by Unsloth", "unsloth", 1.6),
    Goal("full", "full sequences, by the usual recipe", "seed", 9.0),
    Goal("full", "full sequences, share of the ceiling", "ceiling", 0.7),
    Goal("real", "real data, by Unsloth", "unsloth", 4.0),
    Goal("packed", "real data packed, by Unsloth packed", "unsloth", 2.5),
    Goal("conservative-full", "`conservative`, full sequences, by Unsloth", "unsloth", 1.0),
    Goal("conservative-real", "`conservative`, real data, by Unsloth", "unsloth", 1.0),
    Goal("quality-full", "`quality`, full sequences, by Unsloth", "unsloth", 1.0),
    Goal("quality-real", "`quality`, real data, by Unsloth", "unsloth", 1.0),
    Goal("card-12", "full sequences on a card of 12 GiB, by Unsloth", "unsloth", 1.0),
    Goal("card-8", "full sequences on a card of 8 GiB, by Unsloth", "unsloth", 1.0),
)


def publish(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without the ends of logs, and with paths cut down to their last part."""
    cut = {key: _without_folders(value) for key, value in record.items()}
    commands = [[f"./{Path(word).name}" if "/" in word else word for word in each] for each in record["commands"]]
    return cut | {"commands": commands}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items() if key != "log_tail"}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return re.sub(r"(?<![\w.:/])(?:\.{0,2}/)(?:[\w.+-]+/)*", "./", value) if isinstance(value, str) else value


def write_pages(record: dict[str, Any], pages: list[Path]) -> None:
    """Put a record's tables into every page that has places for them."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        names = re.findall(r"<!-- table (\w+) -->", text)
        if not names:
            raise SystemExit(f"{page} has no place for a table")
        tables = make_tables(record, "pt-BR" if ".pt-BR" in page.name else "en")
        if unknown := set(names) - set(tables):
            raise SystemExit(f"{page} has a place for {', '.join(sorted(unknown))}: not one of {', '.join(tables)}")
        page.write_text(put_tables(text, {name: tables[name] for name in names}), encoding="utf-8")


def make_tables(record: dict[str, Any], language: str = "en") -> dict[str, str]:
    """Return a record's tables by name, as Markdown."""
    runs = record["runs"]
    tables = {"engine": render(record).strip(), "goals": judge(runs), "memory": compare_peaks(runs)}
    return tables | {"speed": compare(runs, language)}


def judge(runs: list[dict[str, Any]]) -> str:
    """Return what the engine was to reach and what it reached, as a table."""
    lines = []
    for goal in GOALS:
        is_share = goal.beside == "ceiling"
        reached = _reach(goal, runs)
        cells = ("not measured", "") if reached is None else (_number(reached, is_share), _verdict(reached, goal))
        lines.append((goal.what, _number(goal.least, is_share, digits=1), *cells))
    return markdown(("goal", "at least", "measured", ""), lines)


def _reach(goal: Goal, runs: list[dict[str, Any]]) -> float | None:
    if goal.beside == "ceiling":
        engine = find_best(goal.row, "engine", runs)
        return None if engine is None else ceiling_share(engine, runs)
    other = find_best(goal.row, goal.beside, runs)
    engine = None if other is None else find_engine(other, runs)
    if other is None or engine is None:
        return None
    ratio: float = engine["tok_per_s"] / other["tok_per_s"]
    return ratio


def _number(value: float, is_share: bool, digits: int = 2) -> str:
    return f"{value:.1%}" if is_share else f"{value:.{digits}f} ×"


def _verdict(reached: float, goal: Goal) -> str:
    return "reached" if reached >= goal.least else "**missed**"


def compare_peaks(runs: list[dict[str, Any]]) -> str:
    """Return what the engine's runs took beside what was predicted before they began."""
    figures = ("allocated", "reserved", "device")
    lines = [
        [run["row"], *(_peak(run, figure) for figure in figures)]
        for run in runs
        if run["side"] == "engine" and run.get("measured") and run.get("predicted")
    ]
    return markdown(("row", *(f"{figure}, GiB" for figure in figures)), lines)


def _peak(run: dict[str, Any], figure: str) -> str:
    measured, predicted = (run[key][f"{figure}_bytes"] for key in ("measured", "predicted"))
    return f"{measured / GIB:.2f} / {predicted / GIB:.2f} ({signed((predicted / measured - 1) * 100)})"


def compare(runs: list[dict[str, Any]], language: str) -> str:
    """Return the engine beside Unsloth and the usual recipe in a few lines."""
    words = WORDS[language]
    lines = []
    for row in SPEED_ROWS:
        engine = find_best(row, "engine", runs)
        others = [find_best(row, side, runs) for side in ("unsloth", "seed")]
        rates = [words["none"] if run is None else f"{run['tok_per_s']:,.0f}" for run in (engine, *others)]
        ratios = [_ratio(other, runs) for other in others]
        lines.append([words[row], *rates, *ratios])
    table = markdown(words["head"], lines)
    if language == "pt-BR":
        table = re.sub(r"(?<=\d)[.,](?=\d)", lambda match: {".": ",", ",": "."}[match.group()], table)
    return table


def _ratio(other: dict[str, Any] | None, runs: list[dict[str, Any]]) -> str:
    engine = None if other is None else find_engine(other, runs)
    return "" if other is None or engine is None else f"{engine['tok_per_s'] / other['tok_per_s']:.2f} ×"
