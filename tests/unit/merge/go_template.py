"""As much of Ollama as a Modelfile written here needs: its file parser, and Go's templates with what they use."""

import ast
import re
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, str]
Values = dict[str, Any]
Block = Callable[[Values, Values], str]
"""Writes its text, given the values at the root and those that the dot stands for."""

_ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def parse_modelfile(content: str) -> list[tuple[str, str]]:
    """Return commands and values; a value in quotes ends where a line ends with them."""
    commands = []
    lines = iter(content.removesuffix("\n").split("\n"))
    for line in lines:
        command, _, value = line.partition(" ")
        if command == "PARAMETER":
            command, _, value = value.partition(" ")
        marks = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
        while not (value.endswith(marks) and len(value) >= 2 * len(marks)):
            value += "\n" + next(lines)
        value = value[len(marks) : len(value) - len(marks)]
        commands.append((command, "".join(c for c in value if c.isprintable() or c in "\n\r\t")))
    return commands


def execute(template: str, messages: list[Message] | None = None, *, prompt: str = "", suffix: str = "") -> str:
    """Return what Ollama makes of messages, or of a prompt and what follows the gap."""
    values: Values = {"Prompt": prompt} | ({"Suffix": suffix} if suffix else {})
    if messages is not None:
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        turns = [{key.title(): text for key, text in message.items()} for message in messages]
        values = {"System": system, "Messages": turns}
    nodes = iter(_ACTION.split(template))
    block, end = _parse_block(nodes)
    assert end is None, f"{end} without a beginning"
    return block(values, values)


def _parse_block(nodes: Iterator[str]) -> tuple[Block, str | None]:
    """Return a block up to its `else` or `end`, and which of them it was; None at the end of the template."""
    blocks: list[Block] = []
    end = None
    for text in nodes:
        assert "{{" not in text, f"an action that is none in {text!r}"
        blocks.append(lambda root, dot, text=text: text)
        action = next(nodes, None)
        if action is None or action == "end" or action.startswith("else"):
            end = action
            break
        if action.startswith("if "):
            blocks.append(_parse_if(action.removeprefix("if "), nodes))
        elif action == "range $index, $turn := .Messages":
            blocks.append(_parse_range(nodes))
        else:
            blocks.append(lambda root, dot, action=action: _show(_evaluate(action, root, dot)))
    return (lambda root, dot: "".join(block(root, dot) for block in blocks)), end


def _parse_if(condition: str, nodes: Iterator[str]) -> Block:
    then, end = _parse_block(nodes)
    otherwise: Block = lambda root, dot: ""  # noqa: E731
    if end == "else":
        otherwise, end = _parse_block(nodes)
    elif end is not None and end.startswith("else if "):
        otherwise, end = _parse_if(end.removeprefix("else if "), nodes), "end"
    assert end == "end"
    return lambda root, dot: (then if _evaluate(condition, root, dot) else otherwise)(root, dot)


def _parse_range(nodes: Iterator[str]) -> Block:
    body, end = _parse_block(nodes)
    assert end == "end"
    return lambda root, dot: "".join(
        body(root, turn | {"is_last": index == len(root["Messages"]) - 1})
        for index, turn in enumerate(root.get("Messages", []))
    )


def _show(value: Any) -> str:
    return "<no value>" if value is None else str(value)


def _evaluate(action: str, root: Values, dot: Values) -> Any:
    if action == "gt (len (slice $.Messages $index)) 1":
        return not dot["is_last"]
    if action.startswith("eq .Role "):
        return dot["Role"] == ast.literal_eval(action.removeprefix("eq .Role "))
    if action.startswith('"'):
        return ast.literal_eval(action)
    assert action.startswith("."), f"an unknown action: {action}"
    return dot.get(action.removeprefix("."))
