"""The figures in both READMEs against the estimate and the committed measurements."""

import json
import re
from pathlib import Path

import pytest

from dsft.core.memory.cards import RTX_4090
from dsft.core.units import GIB
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.record import record_comparison
from dsft.estimate_memory.run import compare_presets


def read(page: Path) -> str:
    """Return a README with its numbers written the English way."""
    text = page.read_text(encoding="utf-8")
    if ".pt-BR" in page.name:
        text = re.sub(r"(?<=\d)[.,](?=\d)", lambda match: {".": ",", ",": "."}[match.group()], text)
    return text


@pytest.fixture(params=["README.md", "README.pt-BR.md"])
def text(request: pytest.FixtureRequest, repository: Path) -> str:
    return read(repository / request.param)


def test_the_presets_have_today_s_estimate_and_the_measured_figures(text: str, repository: Path) -> None:
    record = json.loads((repository / "docs/benchmarks/memory.json").read_text(encoding="utf-8"))
    measured = {row["name"]: row for row in record["presets"]}
    estimates = record_comparison(compare_presets(Budget(RTX_4090, "gpu")))["presets"]
    assert {estimate["preset"] for estimate in estimates} == set(measured)
    for estimate in estimates:
        name, plan = estimate["preset"], estimate["plan"]
        predicted = f"{plan['device_bytes'] / GIB:.1f} GiB, {plan['tok_per_s']:,.0f} tokens/s"
        row = measured[name]
        seen = f"{row['measured']['device_bytes'] / GIB:.1f} GiB, {row['tok_per_s']:,.0f} tokens/s"
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(predicted)} \| {re.escape(seen)} \|$", text, re.MULTILINE)


def test_the_errors_are_those_of_the_held_out_rows(text: str, repository: Path) -> None:
    page = (repository / "docs/benchmarks/memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| held out, 30 rows \| (?:reserved|device) \| ([\d.]+ %) \| −([\d.]+ %) ", page, re.MULTILINE)
    [line] = [line for line in text.splitlines() if "(docs/benchmarks/memory.md)" in line and "30" in line]
    assert len(rows) == 2
    for figure in (error for row in rows for error in row):
        assert figure in line
