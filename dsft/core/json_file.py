"""Reading a JSON file of a model or adapter."""

import json
from pathlib import Path
from typing import Any

from dsft.core.errors import ModelError


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        path: The file.
        what: What is to be copied again where the file is damaged.

    Raises:
        ModelError: It can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}.", f"Copy the {what} again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object.", f"Copy the {what} again.")
    return content
