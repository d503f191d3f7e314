"""YAML 1.2 with line numbers, and what it refuses."""

import math
from pathlib import Path

import pytest

from dsft.core.config.yaml_file import read_scalar, read_settings
from dsft.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1E5", 1e5), ("5e+3", 5e3), (".5", 0.5), ("1.", 1.0), ("-2.5", -2.5),
        ("64", 64), ("010", 10), ("0o17", 15), ("0x1f", 31), ("+7", 7),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("-.inf", -math.inf),
        ("yes", "yes"), ("on", "on"), ("no", "no"), ("1_000", "1_000"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("e5", "e5"), (".", "."), ("١", "١"),
    ],
)  # fmt: skip
def test_a_plain_scalar_means_what_yaml_1_2_says(text: str, value: object) -> None:
    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(float(str(read_scalar(".nan"))))


def test_entries_know_their_line_and_how_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("# comment\n\nlora-r: 0x10\nmodel_name: '1e3'\nreference: {memory_gb: 18}\nlist:\n  - 1\n")
    entries, problems = read_settings(path)
    assert problems == []
    assert {name: entry.line for name, entry in entries.items()} == {
        "lora_r": 3, "model_name": 4, "reference": 5, "list": 6,
    }  # fmt: skip
    assert (entries["lora_r"].value, entries["lora_r"].source) == (16, "0x10")
    assert (entries["model_name"].value, entries["model_name"].source) == ("1e3", '"1e3"')
    assert entries["reference"].value == {"memory_gb": 18}
    assert entries["list"].source == "a list"


def test_a_key_that_is_there_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("max-length: 512\nlora_r: 8\nmax_length: 256\n")
    entries, problems = read_settings(path)
    assert entries["max_length"].value == 512
    assert problems == [f"{path}:3: max_length is already set in line 1"]


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("# nothing yet\n")
    assert read_settings(path) == ({}, [])


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"- lora_r\n", ":1: "),
        (b"just text\n", ":1: "),
        (b"lora_r: 8\nepochs: [1\n", ":3: "),
        (b"lora_r: 8\n epochs: 3\n", ":2: "),
        (b"lora_r: 8\n---\nlora_r: 9\n", ":2: "),
        (b"lora_r: *nowhere\n", ":1: "),
        (b"lora_r: \x01\n", ": "),
        (b"\xff\xfe\n", ": "),
        (b"[" * 3000, ": "),
    ],
)
def test_what_is_no_mapping_of_settings_is_refused_with_its_line(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    assert caught.value.found.startswith(f"{path}{place}")
    assert "\n" not in caught.value.found


def test_an_alias_to_its_own_parent_is_no_endless_loop(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("lora_r: &self [*self]\nepochs: &map {again: *map}\n")
    entries, _ = read_settings(path)
    assert entries["lora_r"].source == "a list"
    assert entries["epochs"].source == "a mapping"


def test_a_tag_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"lora_r: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    entries, _ = read_settings(path)
    assert entries["lora_r"].source == "a list"
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_an_unreadable_path_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="can't read the configuration file"):
        read_settings(tmp_path / name)
