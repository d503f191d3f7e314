"""What each setting is in plain words: its kind, limits, default and section; read from the schema alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from dsft.core.config.schema import SECTION_STARTS, TrainConfig

Kind = Literal["bool", "int", "float", "choice", "text"]

_KINDS: dict[str, Kind] = {"boolean": "bool", "integer": "int", "number": "float", "string": "text"}
_KIND_WORDS: dict[Kind, str] = {"bool": "true or false", "int": "a whole number", "float": "a number", "text": "text"}


@dataclass(frozen=True)
class Setting:
    """One setting of the training configuration.

    Attributes:
        name: Field name.
        section: Title of its section.
        help: Its docstring in the schema.
        kind: What its values are.
        choices: The values of a `choice`.
        default: None where there is none, or where it depends on other settings.
        is_optional: Whether null is a value.
        limits: "from 1 to 1024", or empty.
    """

    name: str
    section: str
    help: str
    kind: Kind
    choices: tuple[str, ...]
    default: object
    is_optional: bool
    limits: str

    @property
    def flag(self) -> str:
        """The setting's flag, e.g. `--lora-r`."""
        return "--" + self.name.replace("_", "-")

    @property
    def requirement(self) -> str:
        """What a value must be, e.g. "a whole number from 1 to 1024"."""
        words = f"one of {', '.join(self.choices)}" if self.kind == "choice" else _KIND_WORDS[self.kind]
        return " ".join(filter(None, (words, self.limits))) + (", or null" if self.is_optional else "")


@cache
def describe_settings() -> dict[str, Setting]:
    """Return every setting of `TrainConfig` by name, in the schema's order."""
    properties = TrainConfig.model_json_schema()["properties"]
    return dict(_read_properties(properties))


def format_value(value: object) -> str:
    """Return a setting's value as people write it: true, 2e-4 as 0.0002, 128.0 as 128, null as an empty text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def _read_properties(properties: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Setting]]:
    section = ""
    for name, schema in properties.items():
        section = SECTION_STARTS.get(name, section)
        variants = schema.get("anyOf", [schema])
        main = next(variant for variant in variants if variant.get("type") != "null")
        yield (
            name,
            Setting(
                name=name,
                section=section,
                help=" ".join(schema["description"].split()),
                kind="choice" if "enum" in main else _KINDS[main["type"]],
                choices=tuple(main.get("enum", ())),
                default=schema.get("default"),
                is_optional={"type": "null"} in variants,
                limits=_describe_limits(main),
            ),
        )


def _describe_limits(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"from {format_value(low)} to {format_value(high)}"
    limits = [
        f"{word} {format_value(limit)}"
        for word, limit in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if limit is not None
    ]
    if schema.get("minLength"):
        limits.append("that is not empty")
    words = " and ".join(limits)
    return f"of {words}" if words.startswith("at ") else words
