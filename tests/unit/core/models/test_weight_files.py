"""Reading safetensors by tensors and by rows, held against safetensors' own reading; damaged files are refused."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsft.core.errors import ModelError
from dsft.core.models.weight_files import WeightFiles, list_weight_files, open_model_weights, open_weight_file

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
SHAPES = {"matrix": (5, 3), "vector": (7,), "cube": (4, 2, 3), "scalar": (), "no-rows": (0, 4), "no-columns": (3, 0)}


def make_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of every type and shape, with metadata, whose tensors lie in another order than their names'."""
    tensors = {
        f"{name}-{str(dtype).removeprefix('torch.')}": make_tensor(shape, dtype)
        for dtype in DTYPES
        for name, shape in SHAPES.items()
    }
    save_file(tensors, tmp_path / "file.safetensors", {"format": "pt", "note": "é" * 11})
    return tmp_path / "file.safetensors"


def test_every_type_and_shape_reads_as_safetensors_reads_it(file: Path) -> None:
    expected = load_file(file)
    with open_weight_file(file) as weights:
        assert weights.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert weights.shape(name) == tuple(tensor.shape)
            assert weights.dtype(name) == tensor.dtype
            found = weights.read(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def test_any_rows_are_those_of_the_whole(file: Path) -> None:
    expected = load_file(file)
    with open_weight_file(file) as weights:
        for name in (name for name in expected if not name.startswith("scalar")):
            num_rows = len(expected[name])
            for first in range(num_rows + 1):
                for last in range(first, num_rows + 1):
                    rows = weights.read_rows(name, first, last)
                    assert rows.shape == expected[name][first:last].shape
                    assert torch.equal(rows, expected[name][first:last]), name


def test_the_bytes_lie_where_it_is_said(file: Path) -> None:
    content, expected = file.read_bytes(), load_file(file)
    with open_weight_file(file) as weights:
        places = [(stored.first_byte, stored.num_bytes) for stored in weights.tensors.values()]
        for name, stored in weights.tensors.items():
            raw = content[stored.first_byte : stored.first_byte + stored.num_bytes]
            assert raw == expected[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
    # In the order of the file, without gaps, to its last byte.
    assert [first for first, _ in places[1:]] == [first + size for first, size in places[:-1]]
    assert sum(places[-1]) == len(content)


def test_what_is_read_is_memory_of_its_own(file: Path) -> None:
    with open_weight_file(file) as weights:
        first = weights.read("matrix-float32")
        first.zero_()
        weights.read_rows("matrix-float32", 0, 2).zero_()
        assert torch.equal(weights.read("matrix-float32"), load_file(file)["matrix-float32"])


def test_closing_lets_go_of_the_files_and_reading_opens_them_again(file: Path) -> None:
    weights = open_weight_file(file)
    weights.read("scalar-int32")
    weights.close()
    assert torch.equal(weights.read("vector-int64"), load_file(file)["vector-int64"])
    weights.close()


def test_threads_read_through_one_open_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def open_slowly(*args: Any, right: Callable[..., int] = os.open) -> int:
        time.sleep(0.02)
        opened.append(right(*args))
        return opened[-1]

    expected = load_file(file)["cube-float32"]
    weights = open_weight_file(file)
    monkeypatch.setattr(os, "open", open_slowly)
    with weights, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: weights.read("cube-float32"), range(64)))
    assert all(torch.equal(each, expected) for each in found)
    assert len(opened) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_numbers_of_a_quantized_checkpoint_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with open_weight_file(tmp_path / "model.safetensors") as weights, pytest.raises(ModelError, match="F8_E4M3"):
        weights.read("weight")


def test_a_file_that_shrinks_while_it_is_read_is_refused(file: Path) -> None:
    with open_weight_file(file) as weights:
        *_, last = weights.tensors
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ModelError, match="has become shorter"):
            weights.read(last)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1], id="truncated"),
        pytest.param(lambda content: content + b"\0", id="too-long"),
        pytest.param(lambda content: content[:100], id="truncated-header"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"version https://git-lfs.github.com/spec/v1\n", id="lfs-pointer"),
        pytest.param(lambda content: (2**40).to_bytes(8, "little") + content[8:], id="endless-header"),
        pytest.param(lambda content: content.replace(b'"F32"', b'"F99"'), id="unknown-type"),
    ],
)
def test_a_damaged_file_is_refused_by_name(file: Path, damage: Callable[[bytes], bytes]) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=r"file\.safetensors is damaged"):
        open_weight_file(file)


def write_shards(folder: Path, places: object) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "extra": torch.zeros(1)}, folder / "1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def read_all(weights: WeightFiles) -> dict[str, list[float]]:
    with weights:
        return {name: weights.read(name).flatten().tolist() for name in weights.tensors}


def test_an_index_says_which_file_holds_what(tmp_path: Path) -> None:
    write_shards(tmp_path, {"weight_map": {"b": "2.safetensors", "a": "1.safetensors"}})
    assert read_all(open_model_weights(tmp_path, "it")) == {"a": [0, 1, 2, 3, 4, 5], "b": [1, 1, 1]}


def test_the_files_of_weights_are_known_before_they_are_there(tmp_path: Path) -> None:
    assert list_weight_files(tmp_path) == ["model.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"b": "2.safetensors", "a": "1.safetensors", "c": "2.safetensors"}}')
    assert list_weight_files(tmp_path) == ["1.safetensors", "2.safetensors"]
    index.write_text('{"weight_map": {"b": "../2.safetensors"}}')
    with pytest.raises(ModelError, match="outside its folder"):
        list_weight_files(tmp_path)


def test_an_index_goes_before_a_single_file(tmp_path: Path) -> None:
    write_shards(tmp_path, {"weight_map": {"b": "2.safetensors"}})
    save_file({"b": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert read_all(open_model_weights(tmp_path, "it")) == {"b": [1, 1, 1]}


def test_a_single_file_is_enough(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert read_all(open_model_weights(tmp_path, "it")) == {"b": [0, 0, 0]}


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"my/model has no model\.safetensors"):
        open_model_weights(tmp_path, "my/model")


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ({"weight_map": {"a": "../1.safetensors"}}, r"names the file \.\./1\.safetensors, which is outside"),
        ({"weight_map": {"a": "sub/1.safetensors"}}, "which is outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names the file /etc/passwd, which is outside"),
        ({"weight_map": {"a": ".."}}, "which is outside its folder"),
        ({"weight_map": {"a": ""}}, "which is missing"),
        ({"weight_map": {"a": "3.safetensors"}}, r"names the file 3\.safetensors, which is missing"),
        ({"weight_map": {"c": "1.safetensors"}}, "names c, which is in none of its files"),
        ({"weight_map": ["1.safetensors"]}, "can't be read"),
        ({"metadata": {}}, "can't be read"),
        ([], "can't be read"),
    ],
)
def test_an_index_that_leads_nowhere_or_elsewhere_is_refused(tmp_path: Path, places: object, found: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_shards(folder, places)
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    with pytest.raises(ModelError, match=found):
        open_model_weights(folder, "it")
