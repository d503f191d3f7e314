"""Rows, and looks at what was prepared of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dsft.core.data.prepare import PreparedData
from dsft.core.data.samples import TokenizedDataset
from dsft.core.errors import DataError

ROWS = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(40)]

Prepare = Callable[..., PreparedData]


def write_lines(path: str | Path, rows: list[Any]) -> None:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def contents(samples: TokenizedDataset | None) -> list[tuple[list[int], list[bool]]]:
    assert samples is not None
    found = [samples[index] for index in range(len(samples))]
    return [(sample.token_ids.tolist(), sample.is_target.tolist()) for sample in found]


def texts(samples: TokenizedDataset | None, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(token_ids) for token_ids, _ in contents(samples)]


def error_of(prepare: Prepare, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        prepare(**settings)
    assert caught.value.fix
    return caught.value
