"""Pieces of a model card in Markdown; knows no run. Cards are published, so they hold no home folder of the user."""

import json
import re
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: object) -> bool:
    """Return whether a name of a model or data set is an id of the hub, and not a path or a builtin name."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def format_table(rows: list[tuple[str, str]], header: tuple[str, str] = ("", "")) -> str:
    """Return a table of two columns."""
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in lines)


def format_code(value: object) -> str:
    """Return a value set as code, a path without the user's home folder."""
    return f"`{without_home(str(value)).replace('`', '')}`"


def without_home(path: str) -> str:
    """Return a path with the user's home folder as `~`."""
    home = str(Path.home())
    return f"~{path.removeprefix(home)}" if path == home or path.startswith(f"{home}/") else path


def format_literal(text: str) -> str:
    """Return a text as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def format_generation(prompt: str, *, has_special_tokens: bool = True) -> str:
    """Return the Python that has `model` go on from a prompt and prints what it adds.

    Args:
        prompt: The text the model goes on from.
        has_special_tokens: Whether the prompt spells its special tokens out, so that the tokenizer must add none.
    """
    no_more = "add_special_tokens=False, " if has_special_tokens else ""
    return f"""prompt = {format_literal(prompt)}
inputs = tokenizer(prompt, {no_more}return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_new_tokens=512, do_sample=False)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
