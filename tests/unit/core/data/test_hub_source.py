"""Hub data sets, read from a cache laid out as the datasets library lays it out; the hub itself is never asked."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dsft.core.data import hub_source
from dsft.core.data.hub_source import HubSource, open_hub_source
from dsft.core.data.rows import BadRow, Row
from dsft.core.data.sources import open_source
from dsft.core.errors import DataError, DsftError, ExitCode, UnreachableHubError

NAME = "owner/name"
COMMIT, OTHER_COMMIT = "0123456789abcdef" * 2 + "01234567", "f" * 40
VALUES = {"instruction": "a", "output": "b"}

LayOut = Callable[..., None]


@pytest.fixture
def lay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LayOut:
    """Put a data set's tables of a commit into the cache: `lay_out(COMMIT, train=table)`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def lay_out_tables(commit: str, config: str = "default", **tables: pa.Table) -> None:
        folder = tmp_path / NAME.replace("/", "___") / config / "0.0.0" / commit
        folder.mkdir(parents=True)
        splits = {}
        for split, table in tables.items():
            file_name = f"name-{split}.arrow"
            with pa.OSFile(str(folder / file_name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            splits[split] = {"name": split, "num_bytes": 1, "num_examples": len(table), "dataset_name": "name"}
        info = {
            "builder_name": "parquet",
            "dataset_name": "name",
            "config_name": config,
            "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
            "splits": splits,
        }
        (folder / "dataset_info.json").write_text(json.dumps(info))

    return lay_out_tables


def open_train(revision: str | None = None) -> HubSource:
    return open_hub_source(NAME, ["train"], revision)


def table_of(num_rows: int, output: str = "b") -> pa.Table:
    return pa.table({"instruction": ["a"] * num_rows, "output": [output] * num_rows})


def test_rows_of_a_cached_data_set_are_read(lay_out: LayOut):
    lay_out(COMMIT, train=table_of(1300))
    source = open_source(NAME, split="train", revision=COMMIT)
    rows = list(source.rows())
    assert rows == [Row(number, f"{NAME} row {number + 1}", VALUES) for number in range(1300)]
    assert list(source.rows()) == rows, "a source can be read again"
    assert isinstance(source, HubSource)
    assert (source.name, source.kind, source.commit, source.left_out) == (NAME, "hub", COMMIT, {})


def test_messages_are_lists_of_objects(lay_out: LayOut):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lay_out(COMMIT, train=pa.table({"messages": [messages]}))
    assert [row.values for row in open_train().rows() if isinstance(row, Row)] == [{"messages": messages}]


def test_a_value_that_python_can_t_hold_costs_its_row_only(lay_out: LayOut):
    days = pa.array([2**60, 0], pa.timestamp("ms"))
    lay_out(COMMIT, train=pa.table({"text": ["a", "b"], "day": days}))
    bad, good = open_train().rows()
    assert bad == BadRow(0, f"{NAME} row 1", "has a value that can't be read in the column day")
    assert isinstance(good, Row) and (good.number, good.values["text"]) == (1, "b")


def test_the_first_split_there_is_is_read(lay_out: LayOut):
    lay_out(COMMIT, train=table_of(1), test=table_of(2))
    assert len(list(open_hub_source(NAME, ["validation", "test", "train"], None).rows())) == 2


def test_a_split_that_is_not_there_is_named_with_those_there_are(lay_out: LayOut):
    lay_out(COMMIT, train=table_of(1), test=table_of(2))
    with pytest.raises(DataError) as caught:
        open_hub_source(NAME, ["dev"], None)
    assert caught.value.found == f"The hub's {NAME} has no split dev, but train, test."
    assert "--dataset-split" in caught.value.fix


def test_the_key_tells_splits_commits_and_content_apart(lay_out: LayOut, tmp_path: Path):
    lay_out(COMMIT, train=table_of(2), test=table_of(2))
    keys = {open_train().content_key(), open_hub_source(NAME, ["test"], None).content_key()}
    assert open_train().content_key() in keys, "the same data, the same key"
    (tmp_path / "owner___name").rename(tmp_path / "owner___before")
    lay_out(OTHER_COMMIT, train=table_of(2))
    keys.add(open_train().content_key())
    assert len(keys) == 3


def test_another_revision_than_the_one_asked_for_is_never_taken(lay_out: LayOut):
    lay_out(COMMIT, train=table_of(1))
    with pytest.raises(UnreachableHubError, match=f"{NAME} at revision {OTHER_COMMIT} is not in its local cache"):
        open_train(OTHER_COMMIT)


@pytest.mark.parametrize("newest", [COMMIT, OTHER_COMMIT])
def test_of_several_cached_commits_the_one_asked_for_is_taken(lay_out: LayOut, tmp_path: Path, newest: str):
    lay_out(COMMIT, train=table_of(1))
    lay_out(OTHER_COMMIT, train=table_of(2))
    os.utime(tmp_path / "owner___name" / "default" / "0.0.0" / newest, (4e9, 4e9))
    for commit, num_rows in ((COMMIT, 1), (OTHER_COMMIT, 2)):
        source = open_train(commit)
        assert (source.commit, len(list(source.rows()))) == (commit, num_rows)
    assert open_train().commit == newest, "none was asked for"


def test_a_name_in_camel_case_is_found_in_the_cache(lay_out: LayOut, tmp_path: Path):
    lay_out(COMMIT, train=table_of(1))
    (tmp_path / "owner___name").rename(tmp_path / "owner___my_name-20k")
    for file in (tmp_path / "owner___my_name-20k").rglob("name-train.arrow"):
        file.rename(file.with_name("my_name-20k-train.arrow"))
    assert open_hub_source("owner/MyName-20k", ["train"], COMMIT).commit == COMMIT


def test_a_commit_with_several_configurations_is_not_guessed_at(lay_out: LayOut):
    lay_out(COMMIT, train=table_of(1))
    lay_out(COMMIT, config="other", train=table_of(1))
    for revision in (COMMIT, None):
        with pytest.raises(DataError, match=r"can't be loaded: .*configurations"):
            open_train(revision)


@pytest.mark.parametrize("revision", ["main", "v2", COMMIT[:7]])
def test_without_the_hub_a_branch_or_tag_is_no_commit(lay_out: LayOut, revision: str):
    lay_out(COMMIT, train=table_of(1))
    with pytest.raises(UnreachableHubError) as caught:
        open_train(revision)
    assert f"which commit of {NAME} the revision {revision} is" in caught.value.found
    assert "full id of a commit" in caught.value.fix


def test_a_missing_local_file_with_one_slash_is_named_as_such(lay_out: LayOut):
    with pytest.raises(UnreachableHubError, match=r"there is no local file or folder data/train.txt either"):
        open_source("data/train.txt", split="train", revision=None)


def test_out_of_reach_the_error_names_the_ways_on(lay_out: LayOut):
    with pytest.raises(UnreachableHubError) as caught:
        open_train()
    assert caught.value.exit_code == ExitCode.WRONG_INPUT
    assert f"the data set {NAME} is not in its local cache" in caught.value.found
    assert "--dataset FILE" in caught.value.fix
    assert "--preset tiny" in caught.value.fix


RESPONSE: Any = SimpleNamespace(status_code=404, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "kind", "found", "fix"),
    [
        (datasets.exceptions.DatasetNotFoundError("x"), DataError, "no local file or folder owner/name", "--dataset"),
        (RepositoryNotFoundError("x", response=RESPONSE), DataError, "hub has no such data set", "hf auth login"),
        (HFValidationError("x"), DataError, "no local file or folder owner/name", "--dataset"),
        (GatedRepoError("x", response=RESPONSE), DataError, "needs approval", "hf auth login"),
        (RevisionNotFoundError("x", response=RESPONSE), DataError, "has no revision v2", "--dataset-revision"),
        (ConnectionError("x"), UnreachableHubError, "can't be reached", "--preset tiny"),
        (FileNotFoundError("x"), UnreachableHubError, "can't be reached", "--preset tiny"),
        (HfHubHTTPError("x", response=RESPONSE), UnreachableHubError, "can't be reached", "--preset tiny"),
        (ValueError("Pick a config.\nmore"), DataError, "can't be loaded: Pick a config.", "--dataset FILE"),
        (RuntimeError("Scripts are no longer run"), DataError, "can't be loaded: Scripts", "--dataset FILE"),
        (datasets.exceptions.DatasetGenerationError("x"), DataError, "can't be loaded: x", "--dataset FILE"),
    ],
)
def test_what_the_library_raises_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[DsftError], found: str, fix: str
):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(kind) as caught:
        open_train("v2")
    assert type(caught.value) is kind
    assert found in caught.value.found and "\n" not in caught.value.found
    assert fix in caught.value.fix


def test_a_revision_that_the_library_calls_a_missing_data_set_is_named(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **options: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("x") from RevisionNotFoundError("x", response=RESPONSE)

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(DataError, match=f"^The hub's {NAME} has no revision v2"):
        open_train("v2")


@pytest.mark.parametrize("is_reachable", [True, False])
def test_a_hub_that_does_not_answer_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch, is_reachable: bool):
    """And the library is left as it was found."""
    seen: list[tuple[Any, bool]] = []

    def fail(*args: object, **options: object) -> None:
        seen.append((datasets.config.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled()))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_source, "is_hub_reachable", lambda: is_reachable)
    had_no_bars = datasets.are_progress_bars_disabled()
    with pytest.raises(UnreachableHubError):
        open_train()
    assert seen == [(not is_reachable, True)]
    assert datasets.config.HF_HUB_OFFLINE is False
    assert datasets.are_progress_bars_disabled() == had_no_bars
