"""Make one configuration of defaults, a preset, a file and flags, with the origin of every value."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsft.core.config.describe import Setting, describe_settings
from dsft.core.config.presets import METADATA_KEYS, preset_paths
from dsft.core.config.schema import TrainConfig
from dsft.core.config.yaml_file import read_scalar, read_settings
from dsft.core.errors import ConfigError

_SEE_SETTINGS = "`dsft train --help` lists every setting, docs/configuration.md its limits."

_BELONGS_TO = {
    "model_revision": "model_name",
    "dataset_revision": "dataset",
    "dataset_split": "dataset",
    "validation_dataset": "dataset",
    "validation_split": "validation_dataset",
}
"""Settings that say something about another setting's value; owners come before what they own."""

_MAX_SHOWN_CHARS = 60


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and where each of its values came from.

    Attributes:
        config: The configuration.
        origins: Field name to "default", "preset balanced", "my.yaml:12", "--lora-r" or "2 x lora_r".
    """

    config: TrainConfig
    origins: dict[str, str]


@dataclass(frozen=True)
class _Given:
    """A value as one layer gives it: what it is, how it was written, and how messages and origins name its place."""

    value: Any
    source: str
    subject: str
    origin: str


_Layer = dict[str, _Given]


def load_train_config(
    preset: str | None = None, config_file: Path | None = None, flags: Mapping[str, Any] | None = None
) -> ResolvedConfig:
    """Resolve the training configuration: defaults < preset < file < flags.

    A LoRA rank given without an alpha of the same or a higher layer sets alpha to twice the rank. A revision, split
    or validation set goes with the model or data set its own layer names: it does not outlive that choice.

    Args:
        preset: Name of a preset.
        config_file: YAML file of settings.
        flags: Settings by field name. Texts are read as the setting's type ("2e-4" is a number).

    Returns:
        The configuration with the origin of every value.

    Raises:
        ConfigError: Everything that is wrong with preset, file and flags, at once.
    """
    problems: list[ConfigError] = []
    layers = [
        _read_preset(preset, problems) if preset is not None else {},
        _read_file(config_file, str(config_file), problems) if config_file is not None else {},
        _read_flags(flags or {}),
    ]
    for layer in layers:
        problems += _find_problems(layer)
    if problems:
        raise _combine(problems)

    given = _merge(layers)
    try:
        config = TrainConfig.model_validate({name: entry.value for name, entry in given.items()}, strict=True)
    except ValidationError as error:
        raise _combine(_find_contradictions(error, given)) from error
    origins = {name: given[name].origin if name in given else "default" for name in TrainConfig.model_fields}
    return ResolvedConfig(config, origins)


def _read_preset(name: str, problems: list[ConfigError]) -> _Layer:
    paths = preset_paths()
    if name in paths:
        layer = _read_file(paths[name], f"preset {name}", problems)
        return {key: replace(entry, origin=f"preset {name}") for key, entry in layer.items()}
    presets = f"The presets are {', '.join(paths)}."
    problems.append(ConfigError(f"--preset: there is no preset {name!r}{_suggest(name, paths)}.", presets))
    return {}


def _read_file(path: Path, shown: str, problems: list[ConfigError]) -> _Layer:
    try:
        entries, duplicates = read_settings(path)
    except ConfigError as error:
        problems.append(error)
        return {}
    problems += [ConfigError(f"{duplicate}.", "Remove one of the two.") for duplicate in duplicates]
    return {
        name: _Given(
            value=_read_value(name, entry.value),
            source=entry.source,
            subject=f"{shown}:{entry.line}: {name}",
            origin=f"{shown}:{entry.line}",
        )
        for name, entry in entries.items()
        if name not in METADATA_KEYS
    }


def _read_flags(flags: Mapping[str, Any]) -> _Layer:
    layer = {}
    for key, value in flags.items():
        name = key.replace("-", "_")
        flag = ("--no-" if value is False else "--") + name.replace("_", "-")
        setting = describe_settings().get(name)
        is_written = isinstance(value, str) and setting is not None and setting.kind not in ("text", "choice")
        meaning = _read_value(name, read_scalar(value) if is_written else value)
        layer[name] = _Given(value=meaning, source=str(value), subject=flag, origin=flag)
    return layer


def _read_value(name: str, value: object) -> object:
    setting = describe_settings().get(name)
    if setting is not None and setting.kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3 is a whole number
    return value


def _find_problems(layer: _Layer) -> list[ConfigError]:
    settings = describe_settings()
    wrong: set[str] = set()
    try:
        values = {name: entry.value for name, entry in layer.items() if name in settings}
        TrainConfig.model_validate(values, strict=True)
    except ValidationError as error:
        # Every layer is judged alone, so that an error shows even where a higher layer overrides the value.
        wrong = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
    problems = []
    for name, entry in layer.items():
        if name not in settings:
            problems.append(ConfigError(f"{_describe_unknown(name, entry)}.", _SEE_SETTINGS))
        elif name in wrong:
            problems.append(ConfigError(f"{_describe_wrong(settings[name], entry)}.", _SEE_SETTINGS))
    return problems


def _describe_unknown(name: str, entry: _Given) -> str:
    settings = list(describe_settings())
    containing = [known for known in settings if len(name) > 3 and name in known]
    return f"{entry.subject} is no setting{_suggest(name, containing or settings)}"


def _describe_wrong(setting: Setting, entry: _Given) -> str:
    text = " ".join(entry.source.split()) or "empty"
    shown = text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 1] + "…"
    hint = _suggest(text, setting.choices) if setting.choices else ""
    if setting.kind == "text" and isinstance(entry.value, bool | int | float):
        hint = " (put it in quotes)"
    elif isinstance(entry.value, float) and not isfinite(entry.value):
        hint = " (and finite)"
    return f"{entry.subject} is {shown}, but must be {setting.requirement}{hint}"


def _suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = known if len(known) == 1 else get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _combine(problems: list[ConfigError]) -> ConfigError:
    if len(problems) == 1:
        return problems[0]
    lines = "\n".join(f"  {problem.found}" for problem in problems)
    return ConfigError(f"{len(problems)} settings are wrong:\n{lines}", _SEE_SETTINGS)


def _merge(layers: list[_Layer]) -> _Layer:
    merged: _Layer = {}
    for position, layer in enumerate(layers):
        higher: _Layer = {}
        for above in layers[position + 1 :]:
            higher |= above
        merged |= _without_orphans(layer, higher)
        if "lora_r" in layer and "lora_alpha" not in layer:
            rank = layer["lora_r"]
            merged["lora_alpha"] = replace(rank, value=2 * rank.value, origin="2 x lora_r")
    return merged


def _without_orphans(layer: _Layer, higher: _Layer) -> _Layer:
    kept = dict(layer)
    for name, owner in _BELONGS_TO.items():
        is_replaced = owner in layer and owner in higher and layer[owner].value != higher[owner].value
        if is_replaced or (owner in layer and owner not in kept):
            kept.pop(name, None)
    return kept


def _find_contradictions(error: ValidationError, given: _Layer) -> list[ConfigError]:
    problems = []
    for detail in error.errors(include_url=False):
        name = str(detail.get("ctx", {}).get("setting", ""))
        subject = given[name].subject if name in given else name
        problems.append(ConfigError(f"{subject}: {detail['msg']}.", "Change one of them."))
    return problems
