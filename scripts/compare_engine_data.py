"""The data of `compare_engine.py`: the same rows in two orders, so that packed and unpacked steps have equal samples.

A row is paired with one that fills a sequence exactly. The longer ones are longer than half a sequence, so best fit
decreasing opens a pack for each and finds for each shorter one a pack that it fills: every pack is one such pair. Which
packs a step takes is fixed by their number and the seed. The rows are written once for the packed run, and once so that
the unpacked run, with twice as many sequences a step, takes the samples of the same packs in the same step.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsft.core.config.schema import TrainConfig
from dsft.core.data.packing import pack_sequences
from dsft.core.data.prepare import prepare_data
from dsft.core.data.rows import Row
from dsft.core.data.sources import open_source
from dsft.core.models.source import find_model
from dsft.core.models.tokenizer import load_tokenizer
from dsft.core.paths import cache_dir
from dsft.train.batches import order_of_epoch

SAMPLES_A_PACK = 2


@dataclass(frozen=True)
class DataFiles:
    """The rows of a comparison as JSONL.

    Attributes:
        unpacked: For runs without packing.
        packed: The same rows for a run with packing.
        validation: Other rows, held out.
    """

    unpacked: Path
    packed: Path
    validation: Path


def write_data(config: TrainConfig, folder: Path, *, num_steps: int, packs_a_step: int, num_held_out: int) -> DataFiles:
    """Choose rows of a data set and write them in both orders.

    Args:
        config: Names model and data set, and has the length of a sequence and the seed.
        folder: Where the files are written.
        num_steps: Optimizer steps of each run, all in one epoch.
        packs_a_step: Packs in an optimizer step of the packed run.
        num_held_out: Rows for the validation loss.
    """
    lengths, rows = read_samples(config)
    pairs = find_pairs(lengths, config.max_length, num_steps * packs_a_step, config.seed)
    chosen = pairs.reshape(-1)
    left = np.setdiff1d(np.arange(len(lengths)), chosen)
    if len(left) < num_held_out:
        raise SystemExit(f"{len(left)} samples are left for validation; {num_held_out} were asked for")
    held_out = np.random.default_rng([config.seed, 1]).permutation(left)[:num_held_out]
    order = order_unpacked(lengths[chosen], config.max_length, packs_a_step, config.seed)
    files = DataFiles(folder / "unpacked.jsonl", folder / "packed.jsonl", folder / "validation.jsonl")
    write_rows(files.packed, (rows[index] for index in chosen))
    write_rows(files.unpacked, (rows[index] for index in chosen[order]))
    write_rows(files.validation, (rows[index] for index in held_out))
    return files


def read_samples(config: TrainConfig) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the tokens of each sample that fits a sequence, and the row that it comes from."""
    tokenizer = load_tokenizer(find_model(config.model_name))
    source = open_source(config.dataset, split=config.dataset_split, revision=config.dataset_revision)
    data = prepare_data(
        config,
        source,
        tokenizer.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        cache=cache_dir(),
        on_rows=lambda _num_rows: None,
    )
    values = {row.number: row.values for row in source.rows() if isinstance(row, Row)}
    return data.train.lengths, [values[data.train[index].row] for index in range(len(data.train))]


def find_pairs(lengths: np.ndarray, length: int, num_pairs: int, seed: int) -> np.ndarray:
    """Draw pairs of samples that fill a sequence.

    Returns:
        int64 [num_pairs, 2], the longer sample first.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    generator = np.random.default_rng([seed, 0])
    for index in generator.permutation(len(lengths)).tolist():
        by_length[int(lengths[index])].append(index)
    pairs = [
        pair
        for longer in range(length // 2 + 1, length)
        for pair in zip(by_length[longer], by_length[length - longer], strict=False)
    ]
    if len(pairs) < num_pairs:
        raise SystemExit(
            f"the data has {len(pairs)} pairs of samples that fill {length} tokens; {num_pairs} are needed: "
            "take fewer steps, fewer packs a step or another length"
        )
    drawn = generator.permutation(len(pairs))[:num_pairs]
    return np.array(pairs, dtype=np.int64)[drawn]


def order_unpacked(lengths: np.ndarray, length: int, packs_a_step: int, seed: int) -> np.ndarray:
    """Return in which order samples must stand without packing, for their steps to be those of the packed run.

    Args:
        lengths: Tokens of the samples in the order of the packed run.
        length: Tokens of a sequence.
        packs_a_step: Sequences in an optimizer step of the packed run.
        seed: Of both runs.

    Returns:
        int64 [num_samples]: the sample for each place.
    """
    packs = pack_sequences(lengths, length, seed)
    if any(len(pack) != SAMPLES_A_PACK for pack in packs) or len(packs) % packs_a_step:
        raise SystemExit("packs that are no pairs, or not enough for the last step, can't be had without packing")
    visited = np.concatenate([packs[index] for index in order_of_epoch(len(packs), seed, epoch=0)])
    order = np.empty(len(lengths), dtype=np.int64)
    # A run's n-th sequence is the one at the n-th place of its order.
    order[order_of_epoch(len(lengths), seed, epoch=0)] = visited
    return order


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
