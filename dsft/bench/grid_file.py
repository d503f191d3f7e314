"""Read the rows of a grid file, a YAML list of mappings, with the line of each; judges no setting."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from dsft.core.config.yaml_file import read_scalar
from dsft.core.errors import ConfigError

_EXAMPLE = "Write a list of rows such as `- {preset: balanced, max_length: 2048}`."

_PLAIN_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class GridEntry:
    """One row of a grid file.

    Attributes:
        values: Its keys, dashes made underscores, with what is written (numbers are numbers, all else as it stands).
        line: Line it begins in, from 1.
        lines: Line of each key.
    """

    values: dict[str, object]
    line: int
    lines: dict[str, int]


def read_grid(path: Path) -> list[GridEntry]:
    """Read a grid file.

    Raises:
        ConfigError: The file can't be read, is not YAML, is no list of flat mappings, or is empty.
    """
    root = _compose(path)
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise ConfigError(f"{path}: a grid is a list of rows, and this file holds none.", _EXAMPLE)
    return [_read_row(path, node) for node in root.value]


def _compose(path: Path) -> yaml.Node | None:
    try:
        # The base loader leaves every scalar a text: PyYAML's own reading is YAML 1.1 (2e-4 a text, no a bool).
        return yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ConfigError(
            f"{path}: can't read the grid: {error.strerror}.", "Check the path given with --grid."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}).", "Save the file as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}.", "Correct that line.") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, yaml.YAMLError) else "nested too deeply"
        raise ConfigError(f"{path}: not valid YAML: {reason}.", "Correct the file.") from error


def _read_row(path: Path, node: yaml.Node) -> GridEntry:
    line = int(node.start_mark.line) + 1
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{line}: this row is no mapping of settings.", _EXAMPLE)
    values: dict[str, object] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or not isinstance(value_node, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: a row holds only `setting: value` pairs.", _EXAMPLE)
        key = key_node.value.replace("-", "_")
        key_line = int(key_node.start_mark.line) + 1
        if key in values:
            raise ConfigError(f"{path}:{key_line}: {key} is already set in this row.", "Remove one.")
        is_plain = value_node.style is None and value_node.tag == _PLAIN_TAG
        values[key] = read_scalar(value_node.value) if is_plain else str(value_node.value)
        lines[key] = key_line
    return GridEntry(values, line, lines)
