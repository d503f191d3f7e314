"""Tokenized samples on disk: whole or made anew, whatever is damaged, fails or runs at the same time."""

import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dsft.core.data.cache import STALE_S, StoreWriter, TokenStore, open_or_build
from dsft.core.data.samples import Sample
from dsft.core.data.tokenize import Fate, SampleBatch
from dsft.core.errors import DataError

KEY = "key"
REPORT: dict[str, object] = {"num_rows": 7, "dataset": "ü"}
FILES = ["index", "is_target", "lengths", "prompts", "rows", "token_ids"]
LENGTHS = [3, 1, 4, 2]


def make_batch(lengths: list[int] = LENGTHS, first_row: int = 0, first_id: int = 0) -> SampleBatch:
    num_tokens = sum(lengths)
    return SampleBatch(
        token_ids=np.arange(first_id, first_id + num_tokens, dtype=np.uint32),
        is_target=np.arange(num_tokens) % 2 == 1,
        lengths=np.array(lengths, dtype=np.int64),
        rows=np.arange(first_row, first_row + len(lengths), dtype=np.int64),
        prompts=np.arange(len(lengths), dtype=np.uint64) + np.uint64(2**63),
        fate=Fate(),
    )


def build(writer: StoreWriter) -> dict[str, object]:
    writer.add(make_batch())
    return REPORT


def never(writer: StoreWriter) -> dict[str, object]:
    raise AssertionError("the samples were made again")


def open_store(
    cache: Path, build: Callable[[StoreWriter], dict[str, object]] = build, vocabulary_size: int = 100
) -> tuple[TokenStore, bool]:
    return open_or_build(cache, KEY, vocabulary_size, build)


def contents(samples: TokenStore) -> list[tuple[list[int], list[bool], int]]:
    return [(s.token_ids.tolist(), s.is_target.tolist(), s.row) for s in (samples[i] for i in range(len(samples)))]


EXPECTED = [
    ([0, 1, 2], [False, True, False], 0),
    ([3], [True], 1),
    ([4, 5, 6, 7], [False, True, False, True], 2),
    ([8, 9], [False, True], 3),
]


def test_what_was_written_is_read(tmp_path: Path):
    store, was_there = open_store(tmp_path)
    assert not was_there
    assert contents(store) == EXPECTED
    assert store.lengths.tolist() == LENGTHS
    assert store.prompts.tolist() == [2**63 + index for index in range(4)]
    assert store.report == REPORT


def test_a_second_start_reads_it(tmp_path: Path):
    open_store(tmp_path)
    store, was_there = open_store(tmp_path, never)
    assert was_there
    assert contents(store) == EXPECTED
    assert store.report == REPORT


def test_another_key_is_another_store(tmp_path: Path):
    open_store(tmp_path)
    other, was_there = open_or_build(tmp_path, "other", 100, lambda writer: {"num_rows": 0})
    assert not was_there
    assert len(other) == 0


def test_samples_have_the_types_of_the_contract(tmp_path: Path):
    sample = open_store(tmp_path)[0][2]
    assert isinstance(sample, Sample)
    assert (sample.token_ids.dtype, sample.is_target.dtype) == (np.int64, np.bool_)


def test_an_index_out_of_range_ends_an_iteration(tmp_path: Path):
    store, _ = open_store(tmp_path)
    for index in (-1, len(LENGTHS)):
        with pytest.raises(IndexError):
            store[index]


def test_batches_follow_one_another(tmp_path: Path):
    def build_in_two(writer: StoreWriter) -> dict[str, object]:
        counts = [writer.add(make_batch([3, 1])), writer.add(make_batch([]))]
        counts.append(writer.add(make_batch([4, 2], first_row=2, first_id=4)))
        assert [count.tolist() for count in counts] == [[1, 1], [], [2, 1]]
        return REPORT

    assert contents(open_store(tmp_path, build_in_two)[0]) == EXPECTED


@pytest.mark.parametrize(("vocabulary_size", "num_bytes"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_the_largest_id_survives(tmp_path: Path, vocabulary_size: int, num_bytes: int):
    def build_largest(writer: StoreWriter) -> dict[str, object]:
        writer.add(make_batch([1], first_id=vocabulary_size - 1))
        return REPORT

    store, _ = open_store(tmp_path, build_largest, vocabulary_size)
    assert store[0].token_ids.tolist() == [vocabulary_size - 1]
    assert (store.folder / "token_ids").stat().st_size == num_bytes


def test_other_processes_map_the_same_files(tmp_path: Path):
    store, _ = open_store(tmp_path)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert contents(pickle.loads(pickled)) == EXPECTED
    assert store.folder == tmp_path / "tokens" / KEY


# Damage


def test_the_files_are_those_that_are_damaged_below(tmp_path: Path):
    assert sorted(path.name for path in open_store(tmp_path)[0].folder.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", ["removed", "emptied", "shorter", "longer", "first byte", "middle byte", "last byte"]
)
def test_a_damaged_store_is_made_anew(tmp_path: Path, name: str, damage: str):
    path = open_store(tmp_path)[0].folder / name
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage.endswith("byte"):
        content[{"first": 0, "middle": len(content) // 2, "last": -1}[damage.removesuffix(" byte")]] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes({"emptied": b"", "shorter": content[:-1], "longer": content + b"\0"}[damage])
    store, was_there = open_store(tmp_path)
    assert not was_there
    assert contents(store) == EXPECTED
    assert open_store(tmp_path, never)[1], "and then it is whole"
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [KEY]


def test_no_flipped_bit_of_the_index_goes_unseen(tmp_path: Path):
    """The report in it is shown to the user, and so must be what was counted."""
    folder = open_store(tmp_path)[0].folder
    content = (folder / "index").read_bytes()
    for index in range(0, len(content), 5):
        (folder / "index").write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        with pytest.raises(ValueError, match=r"damaged|incomplete|decode"):
            TokenStore(folder)


def test_an_index_of_another_make_is_no_store(tmp_path: Path):
    folder = open_store(tmp_path)[0].folder
    for content in ("", "{}", "[]", json.dumps({"report": {}, "files": {}})):
        (folder / "index").write_text(content)
        with pytest.raises(ValueError, match="damaged"):
            TokenStore(folder)


# Failures


@pytest.mark.parametrize("error", [DataError("x", "y"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_failing_build_leaves_nothing(tmp_path: Path, error: BaseException):
    def fail(writer: StoreWriter) -> dict[str, object]:
        writer.add(make_batch())
        raise error

    with pytest.raises(type(error)):
        open_store(tmp_path, fail)
    assert list((tmp_path / "tokens").iterdir()) == []
    assert contents(open_store(tmp_path)[0]) == EXPECTED


def test_a_failing_build_keeps_the_stores_there_are(tmp_path: Path):
    open_store(tmp_path)
    with pytest.raises(AssertionError):
        open_or_build(tmp_path, "other", 100, never)
    assert open_store(tmp_path, never)[1]


def test_a_full_disk_is_said(tmp_path: Path):
    def fail(writer: StoreWriter) -> dict[str, object]:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="can't be written: No space left on device") as caught:
        open_store(tmp_path, fail)
    assert "XDG_CACHE_HOME" in caught.value.fix
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_cache_that_can_t_be_a_folder_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't be written"):
        open_store(tmp_path / "file")


def test_what_a_killed_build_left_is_removed_a_day_later(tmp_path: Path):
    old, young = (tmp_path / "tokens" / f"{name}.partial" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "token_ids").write_bytes(b"x")
    os.utime(old, (time.time() - STALE_S - 60,) * 2)
    open_store(tmp_path)
    assert not old.exists()
    assert young.exists(), "another process may be at it"


# Two at once


def test_a_build_of_another_process_may_vanish_at_any_moment(tmp_path: Path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "gone.partial").symlink_to("nowhere")
    assert contents(open_store(tmp_path)[0]) == EXPECTED


def test_of_two_builders_the_second_takes_the_first_one_s_store(tmp_path: Path):
    """The first may already be training on it."""
    inodes = []

    def build_while_another_does(writer: StoreWriter) -> dict[str, object]:
        first = open_store(tmp_path)[0]
        inodes.append((first.folder / "token_ids").stat().st_ino)
        return build(writer)

    store, _ = open_store(tmp_path, build_while_another_does)
    assert contents(store) == EXPECTED
    assert [(store.folder / "token_ids").stat().st_ino] == inodes
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [KEY]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_builders_that_end_at_the_same_moment_all_get_the_samples(tmp_path: Path, is_damaged: bool):
    num_builders = 4
    all_built = threading.Barrier(num_builders)

    def build_together(writer: StoreWriter) -> dict[str, object]:
        report = build(writer)
        all_built.wait(timeout=60)
        return report

    with ThreadPoolExecutor(num_builders) as builders:
        for round_number in range(30):
            cache = tmp_path / str(round_number)
            if is_damaged:
                (open_store(cache)[0].folder / "rows").write_bytes(b"")
            building = [builders.submit(open_store, cache, build_together) for _ in range(num_builders)]
            assert [contents(future.result()[0]) for future in building] == [EXPECTED] * num_builders
            assert [path.name for path in (cache / "tokens").iterdir()] == [KEY]
