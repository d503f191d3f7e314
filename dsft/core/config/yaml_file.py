"""Read a YAML 1.2 mapping of settings and keep the line of each; knows no setting by name."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from dsft.core.errors import ConfigError

_INT = re.compile(r"[-+]?[0-9]{1,300}")  # int() refuses texts of thousands of digits
_BASED_INT = re.compile(r"0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CONSTANTS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False,
}  # fmt: skip

_STRING_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Entry:
    """One setting of a file.

    Attributes:
        value: None, bool, int, float, str; a dict of these; or a list of the texts of its items.
        source: The value as it is written, or "a list", "a mapping".
        line: Line of the key, from 1.
    """

    value: object
    source: str
    line: int


class _Loader(yaml.SafeLoader):
    """A loader that leaves plain scalars to `read_scalar`: PyYAML itself reads YAML 1.1 (2e-4 a text, yes a bool)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # the base's own shape


def read_scalar(text: str) -> bool | int | float | str | None:
    """Return what an unquoted scalar means in YAML 1.2 (core schema): `2e-4` a number, `yes` a text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text, 10)
    if _BASED_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def read_settings(path: Path) -> tuple[dict[str, Entry], list[str]]:
    """Read a YAML file whose root is a mapping.

    Args:
        path: The file. Dashes in its keys count as underscores.

    Returns:
        The entries by key, and one sentence for each key that is there twice.

    Raises:
        ConfigError: The file can't be read, is not YAML, or its root is no mapping.
    """
    root = _compose(path)
    if root is None:
        return {}, []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{_line(root)}: expected settings such as `lora_r: 64`, found {_describe(root)}.",
            "Write one `name: value` a line.",
        )
    entries: dict[str, Entry] = {}
    problems = []
    for key_node, value_node in root.value:
        key = key_node.value.replace("-", "_") if isinstance(key_node, yaml.ScalarNode) else _describe(key_node)
        if key in entries:
            problems.append(f"{path}:{_line(key_node)}: {key} is already set in line {entries[key].line}")
            continue
        entries[key] = Entry(_value(value_node), _describe(value_node), _line(key_node))
    return entries, problems


def _compose(path: Path) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}).", "Save the file as UTF-8.") from error
    except OSError as error:
        raise ConfigError(
            f"{path}: can't read the configuration file: {error.strerror}.", "Check the path given with --config."
        ) from error
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = error.problem or "wrong structure"
        if problem.startswith("but"):  # the second half of PyYAML's own sentence
            problem = f"{error.context}, {problem}"
        raise ConfigError(f"{where}: not valid YAML: {problem}.", "Correct that line.") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, yaml.YAMLError) else "nested too deeply"
        raise ConfigError(f"{path}: not valid YAML: {reason}.", "Correct the file.") from error


def _value(node: yaml.Node) -> object:
    if isinstance(node, yaml.ScalarNode):
        is_plain = node.style is None and node.tag == _STRING_TAG
        return read_scalar(node.value) if is_plain else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_describe(item) for item in node.value]
    # One level is all a setting ever has, and an alias may point back at its own parent.
    return {
        _describe(key): _value(item) if isinstance(item, yaml.ScalarNode) else _describe(item)
        for key, item in node.value
    }


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) if node.style is None else f'"{node.value}"'
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
