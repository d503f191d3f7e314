"""The presets there are, and the seed document's figures for them; `load` makes configurations of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsft.core.config.yaml_file import Entry, read_settings
from dsft.core.errors import ConfigError
from dsft.core.paths import presets_dir

METADATA_KEYS = frozenset({"description", "reference"})
"""Keys of a preset or configuration file that are no settings."""


@dataclass(frozen=True)
class Reference:
    """What the seed document states for a preset on an RTX 4090: its figures, not dsft's measurements."""

    memory_gb: float
    tok_per_s: float
    minutes_per_epoch: float


@dataclass(frozen=True)
class Preset:
    """A preset as a list of them shows it."""

    name: str
    description: str
    reference: Reference | None


def preset_paths() -> dict[str, Path]:
    """Return the file of each preset by its name, in alphabetical order."""
    return {path.stem: path for path in sorted(presets_dir().glob("*.yaml"))}


def list_presets() -> list[Preset]:
    """Return every preset, the smallest first.

    Raises:
        ConfigError: A preset's file is damaged.
    """
    presets = [_read_preset(name, path) for name, path in preset_paths().items()]
    return sorted(presets, key=lambda preset: (preset.reference.memory_gb if preset.reference else 0, preset.name))


def _read_preset(name: str, path: Path) -> Preset:
    entries, _ = read_settings(path)
    description = entries.get("description")
    reference = entries.get("reference")
    return Preset(
        name=name,
        description=str(description.value) if description else "",
        reference=_read_reference(path, reference) if reference else None,
    )


def _read_reference(path: Path, entry: Entry) -> Reference:
    names = ("memory_gb", "tok_per_s", "minutes_per_epoch")
    values = entry.value if isinstance(entry.value, Mapping) else {}
    figures = [values.get(name) for name in names]
    if set(values) != set(names) or not all(isinstance(figure, int | float) for figure in figures):
        raise ConfigError(f"{path}:{entry.line}: reference must hold the numbers {', '.join(names)}.", "Correct it.")
    return Reference(**{name: float(values[name]) for name in names})
