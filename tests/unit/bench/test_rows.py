"""Which configurations are measured: presets, one, or a grid's, each with its settings."""

from pathlib import Path

import pytest

from dsft.bench.grid_file import read_grid
from dsft.bench.rows import choose_rows, is_choice
from dsft.core.errors import ConfigError


def choose(preset=None, config=None, flags=None, grid=None, has_gpu=True):
    return choose_rows(preset, config, flags or {}, grid, has_gpu=has_gpu)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_choice_the_presets_for_the_device_are_measured() -> None:
    assert [row.name for row in choose()] == ["conservative", "balanced", "quality"]
    assert [row.name for row in choose(has_gpu=False)] == ["tiny"]


def test_model_data_and_memory_hold_for_every_preset() -> None:
    rows = choose(flags={"vram": "24", "model_name": "./m", "dataset": "mine.jsonl"})
    assert [row.name for row in rows] == ["conservative", "balanced", "quality"]
    assert {(row.config.vram, row.config.model_name, row.config.dataset) for row in rows} == {(24, "./m", "mine.jsonl")}


def test_any_other_setting_makes_one_configuration() -> None:
    assert not is_choice(None, None, {"vram": "24"}, None)
    assert is_choice(None, None, {"lora_r": "8"}, None)
    [row] = choose(flags={"lora_r": "8"})
    assert (row.name, row.config.lora_r) == ("defaults", 8)
    [row] = choose(preset="quality", flags={"vram": "20"})
    assert (row.name, row.config.max_length, row.config.vram) == ("quality", 2048, 20)


def test_a_configuration_file_gives_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lora_r: 8\ndataset: my.jsonl\n", encoding="utf-8")
    [row] = choose(config=path)
    assert (row.name, row.config.lora_r, row.names_data) == ("mine", 8, True)


def test_data_is_the_users_only_where_the_user_names_it() -> None:
    assert not choose(preset="tiny")[0].names_data
    assert not choose(flags={"lora_r": "8"})[0].names_data
    assert choose(preset="tiny", flags={"dataset": "x.jsonl"})[0].names_data


GRID = """
- preset: balanced
  name: long
  set: held_out
  max-length: 4096
  learning_rate: 2e-4
- {model_name: ./other, lora_r: 8, page_optimizer: no, plan: off}
- {preset: tiny}
"""


def test_a_row_of_a_grid_has_its_own_settings(tmp_path: Path) -> None:
    long, other, tiny = choose(grid=write(tmp_path, GRID))
    assert (long.name, long.set, long.config.max_length, long.config.learning_rate) == ("long", "held_out", 4096, 2e-4)
    assert (other.set, other.config.model_name, other.config.lora_alpha) == (None, "./other", 16)
    assert (other.config.page_optimizer, other.config.plan) == ("no", "off")
    assert other.name == "model_name ./other, lora_r 8, page_optimizer no, plan off"
    assert (tiny.name, tiny.config.device) == ("tiny", "cpu")


def test_flags_override_every_row_and_a_preset_is_the_base_of_rows_without_one(tmp_path: Path) -> None:
    rows = choose("conservative", flags={"vram": "12"}, grid=write(tmp_path, "- {lora_r: 8}\n- {preset: quality}\n"))
    assert [row.config.vram for row in rows] == [12, 12]
    assert [row.config.max_length for row in rows] == [512, 2048]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {lora_r: 0}\n", "grid.yaml:1: lora_r is 0"),
        ("- {preset: tiny}\n- {lora_rank: 3}\n", "grid.yaml:2: lora_rank is no setting"),
        ("- {vram: 1,5}\n", "grid.yaml:1: 5 is no setting"),
        ("- preset: tiny\n  packing: no\n  max-length: 3\n", "grid.yaml:2: packing is no, but must be true or false"),
        ("- preset: tiny\n  packing: no\n  max-length: 3\n", "grid.yaml:3: max_length is 3"),
        ("- {lora_r: false}\n", "grid.yaml:1: lora_r is False"),
        ("- {preset: balanced, keep: best, validation_split: 0}\n", "grid.yaml:1: keep: best needs a validation loss"),
        ("[" * 3000, "nested too deeply"),
        ("- lora_r: 8\n  set: other\n", "grid.yaml:2: set is other, but must be fitted or held_out"),
        ("- {preset: tiny}\n- {preset: tiny}\n", "several rows are called 'tiny'"),
        ("", "this file holds none"),
        ("lora_r: 3\n", "this file holds none"),
        ("- 3\n", "grid.yaml:1: this row is no mapping"),
        ("- {lora_r: [1, 2]}\n", "only `setting: value` pairs"),
        ("- {lora_r: 1, lora-r: 2}\n", "lora_r is already set"),
        ("- {lora_r: 1\n", "not valid YAML"),
    ],
)
def test_a_wrong_grid_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(grid=write(tmp_path, text))
    assert words in caught.value.found


def test_a_wrong_flag_beside_a_grid_is_told_as_a_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lora-r is 0"):
        choose(flags={"lora_r": "0"}, grid=write(tmp_path, "- {lora_r: 8}\n"))


def test_a_grid_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read the grid"):
        read_grid(tmp_path / "none.yaml")
