"""The tables of a dry run: no value, no origin and no technique is lost at any width or in any encoding."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from dsft.cli.views.config import render_config, render_plan
from dsft.core.config.describe import describe_settings, format_value
from dsft.core.config.load import ResolvedConfig, load_train_config

TECHNIQUES = {
    "QLoRA": "NF4 4-bit weights, double quantization, bf16 compute",
    "gradient accumulation": "1 × 16 = effective batch 16, loss normalised by the target tokens of the whole batch",
}


def draw(renderable: RenderableType, width: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width).print(renderable)
    file.seek(0)
    return file.read().splitlines()


def unspaced(*texts: str) -> str:
    return "".join("".join(texts).split())


def resolve(**flags: str) -> ResolvedConfig:
    return load_train_config("conservative", flags={"per_device_train_batch_size": "2"} | flags)


def columns_of(resolved: ResolvedConfig) -> list[tuple[str, str, str]]:
    return [
        (name, format_value(getattr(resolved.config, name)) or "none", resolved.origins[name])
        for name in describe_settings()
    ]


def make_plan(techniques: dict[str, str]) -> Any:
    return SimpleNamespace(num_steps=1234, num_train_samples=19622, num_validation_samples=400, techniques=techniques)


@pytest.mark.parametrize("width", [72, 80, 100, 200])
def test_columns_fold_and_lose_nothing(width: int) -> None:
    resolved = resolve()
    lines = draw(render_config(resolved), width)
    row = next(line for line in lines if line.startswith("  max_samples "))
    bounds = (row.index("none"), row.index("default")), (row.index("default"), None)
    drawn = [unspaced(*(line[start:end] for line in lines)) for start, end in bounds]
    _, values, origins = zip(*columns_of(resolved), strict=True)
    assert drawn == [unspaced(*values), unspaced(*origins)]
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [40, 60, 71])
def test_without_room_for_columns_each_setting_is_followed_by_value_and_origin(width: int) -> None:
    resolved = resolve()
    lines = draw(render_config(resolved), width)
    drawn = unspaced(*lines)
    for cells in columns_of(resolved):
        assert unspaced(*cells) in drawn
    assert "  max_length  512  preset conservative" in lines
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_plan_loses_nothing(width: int) -> None:
    blank, *lines = draw(render_plan(make_plan(TECHNIQUES)), width)
    assert not blank.strip()
    drawn = [unspaced(*(line[: lines[1].index("1,234")] for line in lines))]
    drawn.append(unspaced(*(line[lines[1].index("1,234") :] for line in lines)))
    assert drawn == [
        unspaced("Whatwouldrunoptimizerstepssamplestotrainonsamplesheldout", *TECHNIQUES),
        unspaced("1,23419,622400", *TECHNIQUES.values()),
    ]
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [40, 100])
def test_without_unicode_the_tables_are_ascii(width: int) -> None:
    resolved = resolve(save_dir="./modèle–2")
    assert "./mod?le-2" in " ".join(draw(render_config(resolved), width, encoding="ascii"))
    assert "1x16" in unspaced(*draw(render_plan(make_plan(TECHNIQUES)), width, encoding="ascii"))
