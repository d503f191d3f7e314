"""The documents against the code they describe."""

import re
from pathlib import Path

from dsft.core.config.describe import describe_settings, format_value
from dsft.core.config.presets import list_presets
from dsft.core.errors import ExitCode


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
