"""The documents against the code they describe."""

import json
import re
from dataclasses import fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from dsft.cli.monitor import monitor
from dsft.core.config.describe import describe_settings, format_value
from dsft.core.config.presets import list_presets
from dsft.core.errors import ExitCode
from dsft.monitor import sample
from dsft.monitor.alerts import METRICS
from dsft.monitor.sample import (
    AlertSample,
    DriverSample,
    GpuSample,
    HostSample,
    MigSample,
    Problem,
    ProcessSample,
    RunSample,
    Sample,
)
from dsft.monitor.throttle import find_reason, name_reasons
from dsft.monitor.wait_free import MemoryFree

SCHEMA_TABLES: dict[str, Any] = {
    "### Sample": Sample,
    "### `problem`": Problem,
    "### `driver`": DriverSample,
    "### `gpus`": GpuSample,
    "### `migs`": MigSample,
    "### `processes`": ProcessSample,
    "### `host`": HostSample,
    "### `runs`": RunSample,
    "### `alerts`": AlertSample,
    "### `--wait-free --json`": MemoryFree,
}
"""Headings in docs/monitor.md, each followed by the table of an object's keys."""


def test_every_link_to_a_file_of_the_project_leads_somewhere(repository: Path) -> None:
    pages = [*repository.glob("*.md"), *(repository / "docs").rglob("*.md"), *(repository / "presets").rglob("*.md")]
    assert len(pages) > 8
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name} links {link}"


def test_the_table_of_exit_codes_is_the_enum(repository: Path) -> None:
    text = (repository / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", text, flags=re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(code.value, code.name) for code in ExitCode]


def test_the_exit_codes_are_the_specified_ones() -> None:
    assert [code.value for code in ExitCode] == [0, 1, 2, 3, 4, 5, 75, 130, 143]


def test_the_table_of_settings_is_the_schema(repository: Path) -> None:
    text = (repository / "docs" / "configuration.md").read_text(encoding="utf-8")
    expected, section = [], ""
    for setting in describe_settings().values():
        if setting.section != section:
            section = setting.section
            expected.append(f"### {section}")
        default = format_value(setting.default)
        cells = (f"`{setting.name}`", f"`{default}`" if default else "", setting.requirement, setting.help)
        expected.append(f"| {' | '.join(cells)} |")
    documented = re.findall(r"^(?:### .*|\| `\w+` \|.*\|)$", text, flags=re.MULTILINE)
    assert documented == expected


def test_every_preset_is_documented_with_the_seeds_figures(repository: Path) -> None:
    text = (repository / "docs" / "configuration.md").read_text(encoding="utf-8")
    for preset in list_presets():
        [row] = re.findall(rf"^\| {preset.name} \|.*$", text, flags=re.MULTILINE)
        if preset.reference:
            figures = preset.reference
            assert f"| {figures.memory_gb:g} GB | {figures.tok_per_s:g} | {figures.minutes_per_epoch:g} min |" in row


def test_every_key_of_a_sample_is_documented_and_whether_it_can_be_null(repository: Path) -> None:
    page = repository / "docs" / "monitor.md"
    for heading, kind in SCHEMA_TABLES.items():
        rows = read_rows(page, heading)
        documented = [(name, row[-1] != "never") for row in rows for name in re.findall(r"`(\w+)`", row[0])]
        if kind in {Sample, MemoryFree}:
            assert documented.pop(0) == ("event", False)
            assert rows[0][1] == f"`{kind.__name__}`"
        hints = get_type_hints(kind)
        keys = [(field.name, NoneType in get_args(hints[field.name])) for field in fields(kind)]
        assert documented == keys, f"{heading} is not {kind.__name__}"


def test_no_part_of_a_sample_lacks_its_table() -> None:
    assert {kind for kind in vars(sample).values() if is_dataclass(kind)} == set(SCHEMA_TABLES.values()) - {MemoryFree}


def test_the_table_of_alerts_is_that_of_the_limits(repository: Path) -> None:
    rows = read_rows(repository / "docs" / "monitor.md", "## Alerts")
    assert [row[:2] for row in rows] == [[f"`{name}`", metric.unit] for name, metric in METRICS.items()]


def test_the_table_of_throttle_reasons_has_their_words(repository: Path) -> None:
    rows = read_rows(repository / "docs" / "monitor.md", "## Throttle reasons")
    known = [name for name in name_reasons(2**32 - 1) if not name.startswith("unknown_")]
    reasons = [find_reason(name) for name in known]
    marks = ["red" if reason.is_alarming else "yellow" if reason.is_brake else "" for reason in reasons]
    expected = [[f"`{reason.name}`", reason.words, mark] for reason, mark in zip(reasons, marks, strict=True)]
    assert [row[:3] for row in rows] == expected


def test_the_kinds_of_problems_are_the_documented_ones(repository: Path) -> None:
    [words] = [row[1] for row in read_rows(repository / "docs" / "monitor.md", "### `problem`") if row[0] == "`kind`"]
    source = (repository / "dsft" / "monitor" / "nvml" / "problems.py").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)`", words)) == set(re.findall(r'Problem\(\s*"(\w+)"', source))


def test_every_option_of_the_monitor_is_documented(repository: Path) -> None:
    rows = read_rows(repository / "docs" / "monitor.md", "## Options")
    documented = [name for row in rows for name in re.findall(r"--[\w-]+", row[0])]
    hints = get_type_hints(monitor, include_extras=True)
    # Typer takes the first text of an annotated option for a default, and moves it when the command is made.
    options = [hint.__metadata__[0].default for name, hint in hints.items() if name != "return"]
    assert sorted(documented) == sorted(options)


def test_the_monitors_picture_is_of_samples_of_today(repository: Path) -> None:
    lines = (repository / "docs" / "images" / "monitor-samples.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[-1])
    for value, kind in ((record["gpus"][0], GpuSample), (record["host"], HostSample), (record["runs"][0], RunSample)):
        assert list(value) == [field.name for field in fields(kind)]


def read_rows(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    below = page.read_text(encoding="utf-8").split(f"\n{heading}\n")
    assert len(below) == 2, f"{page.name} has no heading {heading}, or several"
    lines = below[1].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = list(takewhile(lambda line: line.startswith("|"), lines[first:]))[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
