"""Which configurations a bench measures: presets, one configuration, or the rows of a grid file; loads no model."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from dsft.bench.grid_file import GridEntry, read_grid
from dsft.core.config.load import ResolvedConfig, load_train_config
from dsft.core.config.presets import list_presets
from dsft.core.config.schema import TrainConfig
from dsft.core.errors import ConfigError

SetName = Literal["fitted", "held_out"]

COMMON_SETTINGS = frozenset(
    {
        "model_name",
        "model_revision",
        "dataset",
        "dataset_revision",
        "dataset_split",
        "bad_rows",
        "template",
        "max_samples",
        "validation_split",
        "validation_dataset",
        "vram",
        "device",
        "precision",
    }
)
"""Settings that say with what and where a bench runs: given as flags they hold for every preset. Any other makes a
single configuration."""

_ROW_KEYS = frozenset({"name", "set", "preset"})


@dataclass(frozen=True)
class BenchRow:
    """One configuration to measure.

    Attributes:
        name: What results are compared by.
        resolved: The configuration with the origin of each value.
        set: Whether the memory prediction was fitted to this row or the row was held out; None where neither is said.
    """

    name: str
    resolved: ResolvedConfig
    set: SetName | None = None

    @property
    def config(self) -> TrainConfig:
        """The configuration."""
        return self.resolved.config

    @property
    def names_data(self) -> bool:
        """Whether the user named a data set; a preset's own is not read."""
        origin = self.resolved.origins["dataset"]
        return origin != "default" and not origin.startswith("preset ")


def choose_rows(
    preset: str | None, config_file: Path | None, flags: Mapping[str, Any], grid: Path | None, *, has_gpu: bool
) -> list[BenchRow]:
    """Return the configurations to measure, in order.

    Args:
        preset: Name of a preset; with a grid, the base of the rows that name none.
        config_file: YAML file of settings; with a grid, the base of every row.
        flags: Settings by field name; with a grid they override those of every row.
        grid: YAML file of rows.
        has_gpu: Whether there is a GPU to measure; without one, and without a choice, the presets for GPUs are left
            out.

    Raises:
        ConfigError: A setting or a row is wrong.
    """
    if grid is not None:
        return _read_rows(grid, preset, config_file, flags)
    if is_choice(preset, config_file, flags, grid):
        name = preset or (config_file.stem if config_file is not None else "defaults")
        return [BenchRow(name, load_train_config(preset, config_file, flags))]
    rows = [BenchRow(each.name, load_train_config(each.name, None, flags)) for each in list_presets()]
    # What a preset itself says decides for whom it is: a flag for the device does not make the demo one for GPUs.
    is_for_cpu = {each.name: load_train_config(each.name).config.device == "cpu" for each in list_presets()}
    return [row for row in rows if is_for_cpu[row.name] is not has_gpu]


def is_choice(preset: str | None, config_file: Path | None, flags: Mapping[str, Any], grid: Path | None) -> bool:
    """Return whether what the user gave says which configurations are meant."""
    given = (preset, config_file, grid)
    return any(choice is not None for choice in given) or bool(set(flags) - COMMON_SETTINGS)


def _read_rows(path: Path, preset: str | None, config_file: Path | None, flags: Mapping[str, Any]) -> list[BenchRow]:
    rows = [_make_row(path, entry, preset, config_file, flags) for entry in read_grid(path)]
    repeated = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"{path}: several rows are called {repeated[0]!r}.",
            "Give each a `name:` of its own: rows are compared by it.",
        )
    return rows


def _make_row(
    path: Path, entry: GridEntry, preset: str | None, config_file: Path | None, flags: Mapping[str, Any]
) -> BenchRow:
    own = {key: value for key, value in entry.values.items() if key not in _ROW_KEYS}
    row_set = entry.values.get("set")
    if row_set is not None and row_set not in get_args(SetName):
        where = f"{path}:{entry.lines['set']}"
        raise ConfigError(f"{where}: set is {row_set}, but must be fitted or held_out.", "Correct the row.")
    _check_settings(path, entry, own)
    base = entry.values.get("preset", preset)
    try:
        resolved = load_train_config(None if base is None else str(base), config_file, own | dict(flags))
    except ConfigError as error:
        found = _name_key(error.found, {key: value for key, value in own.items() if key not in flags})
        raise ConfigError(f"{path}:{entry.line}: {found}", error.fix) from error
    described = ", ".join(f"{key} {value}" for key, value in own.items())
    name = entry.values.get("name") or ", ".join(filter(None, (str(base or ""), described))) or "defaults"
    return BenchRow(str(name), resolved, cast("SetName | None", row_set))


def _check_settings(path: Path, entry: GridEntry, own: Mapping[str, object]) -> None:
    """Refuse a row's settings that are wrong by themselves, all of them at once, each with its line."""
    problems = []
    for key, value in own.items():
        try:
            load_train_config(flags={key: value})
        except ConfigError as error:
            problems.append(
                ConfigError(f"{path}:{entry.lines[key]}: {_name_key(error.found, {key: value})}", error.fix)
            )
    if len(problems) > 1:
        lines = "\n".join(f"  {problem.found}" for problem in problems)
        raise ConfigError(f"{len(problems)} settings are wrong:\n{lines}", problems[0].fix)
    if problems:
        raise problems[0]


def _name_key(found: str, own: Mapping[str, object]) -> str:
    """Return what was found with the key where it begins with the flag that the key would be on the command line."""
    for key, value in own.items():
        flag = ("--no-" if value is False else "--") + key.replace("_", "-")
        rest = found.removeprefix(flag)
        if rest != found and rest[:1] in (" ", ":"):
            return key + rest
    return found
