"""Measure how fast dsft makes samples of a data file, beside the bare tokenizer on the same text in the same process.

    python scripts/bench_tokenize.py DATA.jsonl TOKENIZER_DIR [--repeats 9]

Ours is everything from the file to the store on disk: reading, checking, templates, token ids, loss masks, writing.
The bare tokenizer is one call of tokenizers' encode_batch_fast on the finished texts, without taking the ids out.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dsft.core.data.build import SampleBuilder
from dsft.core.data.cache import StoreWriter
from dsft.core.data.examples import Conversation
from dsft.core.data.formats import find_layout
from dsft.core.data.prompts import get_template
from dsft.core.data.rows import Row
from dsft.core.data.sources import open_source
from dsft.core.data.tokenize import LengthRule, SampleMaker

RULE = LengthRule(max_length=1024, over_length="drop", loss_on="response", seed=0)


def time_call(call: Callable[[], object]) -> float:
    """Return the seconds a call takes; freeing its result is not counted."""
    started_s = time.perf_counter()
    result = call()
    duration_s = time.perf_counter() - started_s
    del result
    return duration_s


def measure(data: Path, tokenizer: Any, repeats: int) -> dict[str, object]:
    """Measure both, in turn, so that what else the machine does falls on both alike.

    Args:
        data: A data file of one of the layouts with prompt and response.
        tokenizer: A fast tokenizer of transformers.
        repeats: How often each is measured.

    Returns:
        Rows, median rates in rows a second, and their ratio.
    """
    source = open_source(str(data), split="train", revision=None)
    rows = [row for row in source.rows() if isinstance(row, Row)]
    layout = find_layout(rows[0], source.kind)
    template = get_template("instruction", tokenizer)
    texts = []
    for row in rows:
        example = layout.parse(row.values)
        if not isinstance(example, Conversation):
            raise SystemExit(f"{data} has no prompts and responses")
        texts.append("".join(segment.text for segment in template.render(example)))
    backend = tokenizer.backend_tokenizer

    def run_bare() -> object:
        return backend.encode_batch_fast(texts, add_special_tokens=False)

    def run_ours() -> object:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
            writer = StoreWriter(Path(folder), template.encoder.vocabulary_size, files)
            maker = SampleMaker(template, RULE)
            builder = SampleBuilder(source, layout, maker, RULE, None, "error", lambda _: None)
            report = builder.build(writer)
            writer.finish(report)
            return report

    run_bare(), run_ours()  # both have their word caches warm
    seconds = [(time_call(run_bare), time_call(run_ours)) for _ in range(repeats)]
    bare_s, ours_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "rows": len(rows),
        "bare_rows_per_s": round(len(rows) / bare_s),
        "ours_rows_per_s": round(len(rows) / ours_s),
        "ratio": round(statistics.median(bare / ours for bare, ours in seconds), 3),
        "ratio_of_medians": round(bare_s / ours_s, 3),
        "repeats": repeats,
    }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True, trust_remote_code=False)
    print(json.dumps(measure(options.data, tokenizer, options.repeats), indent=2))


if __name__ == "__main__":
    main()
