"""Host memory and disk of a run, and a merge's memory, against figures worked out by hand and against real files."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsft.core.data.cache import StoreWriter
from dsft.core.data.tokenize import Fate, SampleBatch
from dsft.core.memory import host
from dsft.core.memory.host import (
    LEAST_COPY_BYTES,
    PROCESS_BYTES,
    RunFiles,
    estimate_disk,
    estimate_host_memory,
    estimate_streamed_merge,
    estimate_whole_merge,
)
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, ModelShape, read_model_shape
from dsft.core.memory.training import Term
from dsft.core.models import nf4_cache
from dsft.core.models.device import Device
from dsft.core.models.nf4_model import load_nf4_model
from dsft.core.models.source import find_model
from dsft.core.paths import nf4_cache_dir
from tests.scripted_models import write_random_model

SHAPE = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7b")
MODEL_BYTES = 2 * 6_740_512_768
LORA = 159_907_840  # rank 64
FILES = RunFiles(SHAPE, 64, num_checkpoints=2, has_validation=True, num_dataset_tokens=1000)


def sizes(terms: tuple[Term, ...]) -> dict[str, int]:
    return {term.name: term.num_bytes for term in terms}


def test_disk_holds_model_copy_data_checkpoints_adapters_and_a_merged_model() -> None:
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    largest_scales = 3 * 32 * 256  # the float32 of an MLP layer's scales, rounded up to 512 bytes
    tables = 32 * 7 * (1024 + 512 + 512)  # both codes and an offset for each layer
    scales = linears // 64 + 4 * linears // (64 * 256) + largest_scales + tables
    rest = 2 * (2 * 32256 * 4096 + (2 * 32 + 1) * 4096)
    assert sizes(estimate_disk(FILES)) == {
        "model": MODEL_BYTES,
        "quantized copy": linears // 2 + scales + rest,
        "tokenized data": 3000,
        "checkpoints": 3 * 12 * LORA,
        "best adapter": 2 * 4 * LORA,
        "final adapter": 4 * LORA,
        "merged model, if made": MODEL_BYTES,
    }


def test_what_a_run_does_not_write_takes_no_disk() -> None:
    names = sizes(estimate_disk(replace(FILES, has_validation=False, num_dataset_tokens=None)))
    assert "best adapter" not in names
    assert "tokenized data" not in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_quantized_copy_takes_as_much_as_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    assert nf4_cache.LEAST_COPY_BYTES == LEAST_COPY_BYTES
    for module in (nf4_cache, host):
        monkeypatch.setattr(module, "LEAST_COPY_BYTES", 0)
    source = find_model(str(write_random_model(tmp_path / "model", hidden_size=256, intermediate_size=1024)))
    load_nf4_model(source, Device("cpu", "CPU"), dtype, {}, lambda _: None)
    [copy] = nf4_cache_dir().iterdir()
    shape = read_model_shape(source.model_config, "model")
    files = RunFiles(shape, 8, 1, has_validation=False, value_bytes=dtype.itemsize)
    assert sizes(estimate_disk(files))["quantized copy"] == pytest.approx(copy.stat().st_size, rel=0.03)


def test_no_copy_is_kept_of_a_small_model(repository: Path) -> None:
    config = json.loads((repository / "presets/tiny/model/config.json").read_text(encoding="utf-8"))
    tiny = replace(FILES, shape=read_model_shape(config, "tiny"))
    assert "quantized copy" not in sizes(estimate_disk(tiny))


@pytest.mark.parametrize("vocab_size", [32256, 100_000])
def test_a_token_takes_as_much_of_the_cache_as_is_said(tmp_path: Path, vocab_size: int) -> None:
    tokens = 5000
    batch = SampleBatch(
        token_ids=np.zeros(tokens, dtype=np.uint32),
        is_target=np.ones(tokens, dtype=np.bool_),
        lengths=np.array([tokens]),
        rows=np.array([0]),
        prompts=np.array([0], dtype=np.uint64),
        fate=Fate(),
    )
    with ExitStack() as files:
        writer = StoreWriter(tmp_path, vocab_size, files)
        writer.add(batch)
        writer.finish({})
    written = sum((tmp_path / name).stat().st_size for name in ("token_ids", "is_target"))
    shape = replace(SHAPE, vocab_size=vocab_size)
    files_of_run = RunFiles(shape, 8, 1, has_validation=False, num_dataset_tokens=tokens)
    assert sizes(estimate_disk(files_of_run))["tokenized data"] == written


def test_host_memory_is_the_process_what_was_paged_out_and_last_the_file_pages() -> None:
    terms = estimate_host_memory(replace(FILES, paged_out_bytes=77))
    assert [term.num_bytes for term in terms] == [PROCESS_BYTES, 77, MODEL_BYTES]
    assert [term.num_bytes for term in estimate_host_memory(FILES)] == [PROCESS_BYTES, MODEL_BYTES]


def test_the_process_is_what_the_committed_run_measured(repository: Path) -> None:
    record = json.loads((repository / "docs/benchmarks/train-6.7b-h100.json").read_text(encoding="utf-8"))
    measured = record["peak_host_memory_bytes"] - MODEL_BYTES
    assert pytest.approx(measured, rel=0.01) == PROCESS_BYTES


@pytest.mark.parametrize(
    ("what", "estimate"), [("PEFT, cpu", estimate_whole_merge), ("dsft, cpu, verified", estimate_streamed_merge)]
)
def test_merges_take_what_the_committed_run_measured(
    what: str, estimate: Callable[[ModelShape, int], int], repository: Path
) -> None:
    record = json.loads((repository / "docs/benchmarks/merge-6.7b.json").read_text(encoding="utf-8"))
    [measured] = [row["peak_bytes"] for row in record["rows"] if row["what"] == what]
    assert estimate(SHAPE, record["rank"]) == pytest.approx(measured, rel=0.1)


def test_a_merge_of_the_whole_model_grows_with_it_a_streamed_one_with_its_largest_layer() -> None:
    deeper = replace(SHAPE, num_blocks=64)
    assert estimate_streamed_merge(deeper, 64) == estimate_streamed_merge(SHAPE, 64)
    block = SHAPE.num_linear_weights // 32 + SHAPE.norm_weights
    assert estimate_whole_merge(deeper, 64) - estimate_whole_merge(SHAPE, 64) == 32 * 2 * block + 4 * LORA
