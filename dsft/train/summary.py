"""What a finished run leaves beside its adapter: training_summary.json, loss.png and README.md; written and read."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dsft.core.errors import ModelError
from dsft.train.events import TrainResult
from dsft.train.loss_plot import draw_losses
from dsft.train.model_card import render_model_card

SUMMARY = "training_summary.json"
PLOT = "loss.png"
CARD = "README.md"


def write_summary(result: TrainResult, folder: Path) -> None:
    """Write summary, plot and model card; each file appears whole or not at all, the summary last.

    Args:
        result: What the run did.
        folder: Where the adapter is; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / PLOT, draw_losses(result))
    _replace(folder / CARD, render_model_card(result).encode())
    content = json.dumps(to_plain(dataclasses.asdict(result)), indent=1, ensure_ascii=False, allow_nan=False)
    _replace(folder / SUMMARY, f"{content}\n".encode())


def read_summary(folder: Path) -> TrainResult:
    """Read training_summary.json. Keys this version does not know are passed over; null for a number is NaN.

    Raises:
        ModelError: There is no such file, or it is not a summary.
    """
    path = folder / SUMMARY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no {SUMMARY}, so it is no finished run of dsft.", "Name the folder a run has saved."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}.", "Copy the folder again, or train again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object.", "Copy the folder again, or train again.")
    try:
        return TypeAdapter(TrainResult).validate_python(_restore_nan(content))
    except ValidationError as error:
        wrong = ", ".join(sorted({str(problem["loc"][0]) for problem in error.errors()}))
        raise ModelError(
            f"{path} lacks these fields, or they are of another kind: {wrong}.",
            "Copy the folder again, or train again.",
        ) from error


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def to_plain(value: Any) -> Any:
    """Return a value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _restore_nan(content: dict[str, Any]) -> dict[str, Any]:
    for name, kind in get_type_hints(TrainResult).items():
        if kind is float and name in content and content[name] is None:
            content[name] = math.nan
        if kind == list[tuple[int, float]] and isinstance(content.get(name), list):
            content[name] = [
                [point[0], math.nan] if isinstance(point, list) and len(point) == 2 and point[1] is None else point
                for point in content[name]
            ]
    return content
