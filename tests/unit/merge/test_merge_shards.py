"""Dividing a merged model into files and writing them as a stream that safetensors and transformers read."""

import functools
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import dsft.merge.shards
from dsft.merge.config import MergeConfig, OutputDtype
from dsft.merge.run import run_merge
from dsft.merge.shards import MAX_SHARD_BYTES, Shard, ShardLayout, lay_out, write_shard
from dsft.merge.weights import MergedTensor
from tests.merge_kinds import PLAIN
from tests.merge_models import write_base, write_lora

TENSORS = tuple(
    MergedTensor(f"t{index}", shape) for index, shape in enumerate([(4, 8), (8,), (), (16, 8), (0, 3), (5,)])
)


def test_every_tensor_is_in_one_file_that_holds_no_more_than_it_may() -> None:
    layout = lay_out(TENSORS, "float32", max_bytes=200)
    assert [tensor for shard in layout.shards for tensor in shard.tensors] == list(TENSORS)
    sizes = [sum(layout.tensor_bytes(tensor) for tensor in shard.tensors) for shard in layout.shards]
    # 128 + 32 + 4 bytes; 512 are too many but can't be divided; 0 + 20.
    assert sizes == [164, 512, 20]
    assert layout.num_bytes == sum(sizes)
    assert [shard.file for shard in layout.shards] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_a_file_may_be_full_to_the_byte() -> None:
    assert len(lay_out(TENSORS[:2], "float32", max_bytes=160).shards) == 1
    assert len(lay_out(TENSORS[:2], "float32", max_bytes=159).shards) == 2


@pytest.mark.parametrize(("dtype", "num_bytes"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_one_file_has_the_name_of_a_whole_model(dtype: OutputDtype, num_bytes: int) -> None:
    layout = lay_out(TENSORS, dtype)
    assert [shard.file for shard in layout.shards] == ["model.safetensors"]
    assert layout.num_bytes == num_bytes * sum(prod(tensor.shape) for tensor in TENSORS)


def test_the_6_7b_shape_lies_in_three_files_of_at_most_5_gb() -> None:
    layer = [("q", (4096, 4096)), ("k", (4096, 4096)), ("v", (4096, 4096)), ("o", (4096, 4096))]
    layer += [("gate", (11008, 4096)), ("up", (11008, 4096)), ("down", (4096, 11008)), ("n1", (4096,)), ("n2", (4096,))]
    ends = [
        MergedTensor("embedding", (32256, 4096)),
        MergedTensor("head", (32256, 4096)),
        MergedTensor("norm", (4096,)),
    ]
    blocks = [MergedTensor(f"{index}.{name}", shape) for index in range(32) for name, shape in layer]
    layout = lay_out([*ends, *blocks], "bfloat16")
    assert layout.num_bytes == 13_481_025_536
    assert len(layout.shards) == 3
    assert MAX_SHARD_BYTES == 5 * 10**9
    assert all(sum(map(layout.tensor_bytes, shard.tensors)) <= 5 * 10**9 for shard in layout.shards)


def make_pieces(tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    for tensor in tensors.values():
        yield from (tensor.split(3) if tensor.ndim else (tensor,))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_safetensors_reads_what_was_written(dtype: OutputDtype, tmp_path: Path) -> None:
    tensors = {tensor.name: torch.randn(tensor.shape).to(getattr(torch, dtype)) for tensor in TENSORS}
    layout = lay_out(TENSORS, dtype)
    written = list(write_shard(tmp_path, layout.shards[0], layout, make_pieces(tensors)))
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert sum(written) == layout.num_bytes and len(written) > len(TENSORS)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header_bytes = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    assert (tmp_path / "model.safetensors").stat().st_size == 8 + header_bytes + layout.num_bytes


def test_a_piece_that_is_a_view_of_something_else_is_written_in_its_own_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    layout = lay_out([MergedTensor("t", (4, 3))], "float32")
    list(write_shard(tmp_path, layout.shards[0], layout, iter([tensor])))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], tensor)


def test_numbers_that_do_not_fill_the_file_are_an_error(tmp_path: Path) -> None:
    layout = ShardLayout((Shard("model.safetensors", TENSORS[:1]),), "float32")
    with pytest.raises(ValueError, match="got 64 bytes, and its header says 128"):
        list(write_shard(tmp_path, layout.shards[0], layout, iter([torch.zeros(2, 8)])))


def test_a_model_in_several_files_is_the_one_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(tmp_path / "adapter", write_base(tmp_path / "base"), PLAIN.settings)
    run_merge(MergeConfig(str(tmp_path / "adapter"), tmp_path / "one"), lambda event: None)
    monkeypatch.setattr(dsft.merge.shards, "lay_out", functools.partial(lay_out, max_bytes=60_000))
    result = run_merge(MergeConfig(str(tmp_path / "adapter"), tmp_path / "many"), lambda event: None)

    assert len(result.shards) > 3
    assert {path.name for path in (tmp_path / "many").glob("*.safetensors")} == set(result.shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": result.num_parameters, "total_size": result.weight_bytes}
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == expected.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], expected[name])
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
