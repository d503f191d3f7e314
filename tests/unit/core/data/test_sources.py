"""Finding a data set by its name: files, folders of data, folders of source files, shipped data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsft.core.data.rows import BadRow, Row
from dsft.core.data.sources import SOURCE_FILES, Source, SourceFolder, open_source
from dsft.core.errors import DataError, UnreachableHubError

ROW = '{"instruction": "a", "output": "b"}\n'

Write = Callable[[dict[str, str | bytes]], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write files into the folder in which the test stands."""
    monkeypatch.chdir(tmp_path)

    def write_files(files: dict[str, str | bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path

    return write_files


def open_plain(name: str, split: str = "train") -> Source:
    return open_source(name, split=split, revision=None)


def places(source: Source) -> list[str]:
    return [row.where for row in source.rows()]


def error_of(name: str) -> DataError:
    with pytest.raises(DataError) as caught:
        open_plain(name)
    assert caught.value.fix
    return caught.value


# Files


def test_rows_of_a_file_are_numbered_with_the_bad_ones(write: Write):
    write({"f.jsonl": f"{ROW}\n17\n{ROW}"})
    source = open_plain("f.jsonl")
    expected: list[Row | BadRow] = [
        Row(0, "f.jsonl:1", json.loads(ROW)),
        BadRow(1, "f.jsonl:3", "is no JSON object"),
        Row(2, "f.jsonl:4", json.loads(ROW)),
    ]
    assert list(source.rows()) == expected
    assert list(source.rows()) == expected, "a source can be read again"
    assert (source.name, source.kind) == ("f.jsonl", "files")


def test_a_file_is_named_as_typed(write: Write):
    folder = write({"data/f.csv": "text\na\n"})
    for name in ("data/f.csv", "./data/f.csv", str(folder / "data" / "f.csv")):
        assert places(open_plain(name)) == [f"{name}:2"]


def test_home_is_found(write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(write({"f.jsonl": ROW})))
    assert places(open_plain("~/f.jsonl")) == ["~/f.jsonl:1"]
    assert error_of("~nobody-of-that-name/f.jsonl").found == "There is no data file ~nobody-of-that-name/f.jsonl."


def test_shipped_data_is_found_by_its_builtin_name(repository: Path):
    source = open_plain("builtin:tiny/tasks-train.jsonl")
    lines = (repository / "presets" / "tiny" / "tasks-train.jsonl").read_text().splitlines()
    assert [row.values for row in source.rows() if isinstance(row, Row)] == [json.loads(line) for line in lines]
    assert "builtin:../tiny.yaml" in error_of("builtin:../tiny.yaml").found


@pytest.mark.parametrize("name", ["dat.jsonl", "./dat", "data", "a/b/c", "/no/such/place", "~/x", "no/such/file.csv"])
def test_a_missing_file_is_named_without_asking_the_hub(write: Write, name: str):
    write({})
    assert error_of(name).found == f"There is no data file {name}."


def test_a_file_with_nearly_that_name_is_suggested(write: Write):
    write({"sub/my-data.jsonl": ROW})
    assert error_of("sub/my_data.jsonl").fix == "Did you mean sub/my-data.jsonl?"


def test_a_name_with_an_owner_is_one_of_the_hub(write: Write):
    write({})
    with pytest.raises(UnreachableHubError, match="owner/name"):
        open_plain("owner/name")


def test_a_folder_with_the_name_of_a_hub_data_set_goes_first(write: Write):
    write({"owner/name/f.jsonl": ROW})
    assert places(open_plain("owner/name")) == ["owner/name/f.jsonl:1"]


@pytest.mark.parametrize("name", ["f.jsonl", "d", "owner/name", "builtin:tiny/tasks-train.jsonl"])
def test_what_is_local_has_no_revision(write: Write, name: str):
    write({"f.jsonl": ROW, "d/f.jsonl": ROW, "owner/name/f.jsonl": ROW})
    with pytest.raises(DataError) as caught:
        open_source(name, split="train", revision="v2")
    assert caught.value.found == f"{name} is a local file or folder, so it has no revision v2."
    assert "--dataset-revision" in caught.value.fix


def test_a_missing_file_is_missing_whatever_the_revision(write: Write):
    write({})
    with pytest.raises(DataError, match=r"^There is no data file f\.jsonl"):
        open_source("f.jsonl", split="train", revision="v2")


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.parquet"])
def test_an_empty_file_is_named(write: Write, name: str):
    write({name: ""})
    assert error_of(name).found == f"{name} is empty."


@pytest.mark.parametrize("name", ["f.txt", "f"])
def test_a_file_of_another_kind_is_refused_with_the_kinds_there_are(write: Write, name: str):
    write({name: ROW})
    error = error_of(name)
    assert error.found.startswith(f"{name} is of no known kind")
    assert all(suffix in error.fix for suffix in (".json", ".jsonl", ".csv", ".parquet"))


# Folders of data


def test_the_data_files_of_a_folder_are_one_data_set(write: Write):
    write(
        {"d/b.jsonl": ROW, "d/a.csv": "text\nx\n", "d/sub/c.json": f"[{ROW}]", "d/README.md": "# d", "d/LICENSE": "x"}
    )
    source = open_plain("d/")
    assert places(source) == ["d/a.csv:2", "d/b.jsonl:1", "d/sub/c.json:1"]
    assert [row.number for row in source.rows()] == [0, 1, 2]
    assert source.left_out == {}


@pytest.mark.parametrize(
    "files",
    [
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl", "valid.jsonl"],
        ["my_train.jsonl", "my_training.jsonl", "my_dev.jsonl", "my_eval.jsonl"],
        ["train/0.jsonl", "train/1.jsonl", "test/0.jsonl", "validation/0.jsonl"],
        ["data/train/x/0.jsonl", "data/train/x/1.jsonl", "data/test/x/0.jsonl", "data/dev/x/0.jsonl"],
    ],
)
def test_only_the_wanted_split_of_a_folder_is_read(write: Write, files: list[str]):
    write({f"d/{name}": ROW for name in files})
    source = open_plain("d")
    assert places(source) == [f"d/{name}:1" for name in sorted(files) if "train" in name]
    assert source.left_out == {"of another split": 2}


def test_the_first_split_there_is_serves_for_validation(write: Write):
    write({"d/train.jsonl": ROW, "d/test.jsonl": ROW})
    assert places(open_source("d", split=["validation", "test", "train"], revision=None)) == ["d/test.jsonl:1"]
    write({"d/dev.jsonl": ROW})
    assert places(open_source("d", split=["validation", "test", "train"], revision=None)) == ["d/dev.jsonl:1"]


def test_a_split_that_a_folder_lacks_is_named_with_those_it_has(write: Write):
    write({"d/test.jsonl": ROW, "d/rest.jsonl": ROW})
    assert error_of("d").found == "The folder d has no split train, but files of no split, test."


def test_a_word_inside_another_tells_no_split(write: Write):
    write({"d/contest.jsonl": ROW, "d/trainer.jsonl": ROW})
    assert places(open_plain("d")) == ["d/contest.jsonl:1", "d/trainer.jsonl:1"]


@pytest.mark.parametrize(
    ("files", "data", "others"),
    [
        (["a.jsonl", "notes.txt"], "a.jsonl", "notes.txt"),
        (["a.parquet", "b.csv", "README.md", "NOTES", "paper.pdf"], "a.parquet and 1 more", "NOTES and 1 more"),
        (["train/0.jsonl", "test/0.jsonl", "notes.md"], "test/0.jsonl and 1 more", "notes.md"),
        (["alpaca.json", "old.json.gz"], "alpaca.json", "old.json.gz"),
    ],
)
def test_a_document_does_not_make_data_files_source_text(write: Write, files: list[str], data: str, others: str):
    write({f"d/{name}": ROW for name in files})
    error = error_of("d")
    assert error.found == (
        f"The folder d holds data files ({data}) and other files ({others}), so it can't be told whether it is a data "
        "set or source text."
    )
    assert "the data file itself" in error.fix


# Folders of source files


@pytest.mark.parametrize("data", ["package.json", "data.jsonl", "data/table.csv", "a.parquet"])
def test_data_files_among_source_files_leave_a_source_tree_what_it_is(write: Write, data: str):
    write({f"src/{data}": ROW, "src/README.md": "# s", "src/notes.txt": "n", "src/lib/index.js": "f()"})
    assert open_plain("src").kind == SOURCE_FILES


def test_documents_alone_are_text_to_learn(write: Write):
    write({"d/a.md": "a", "d/b.txt": "b"})
    assert places(open_plain("d")) == ["d/a.md", "d/b.txt"]


def test_each_source_file_is_a_row(write: Write):
    write({"src/b.py": "b = 1\r\n\tü\n", "src/a/z.c": b"\xef\xbb\xbfint z;", "src/data.json": "[]"})
    source = open_plain("src")
    assert source.kind == SOURCE_FILES
    assert list(source.rows()) == [
        Row(0, "src/a/z.c", {"text": "int z;", "path": "a/z.c"}),
        Row(1, "src/b.py", {"text": "b = 1\r\n\tü\n", "path": "b.py"}),
        Row(2, "src/data.json", {"text": "[]", "path": "data.json"}),
    ]


def test_what_is_no_source_text_is_left_out_and_counted(write: Write):
    folder = write(
        {
            "src/a.py": "a",
            "src/.git/config": "x",
            "src/.hidden.py": "x",
            "src/__pycache__/a.pyc": b"\0",
            "src/empty.py": "",
            "src/blank.py": " \n",
            "src/picture.png": b"\x89PNG\0\0",
            "src/latin.py": b"# caf\xe9",
        }
    )
    (folder / "src" / "dangling.py").symlink_to("nowhere")
    source = open_plain("src")
    assert places(source) == ["src/a.py"]
    assert source.left_out == {"empty": 2, "binary": 1, "not in UTF-8": 1}


@pytest.mark.parametrize("files", [{}, {"d/picture.png": b"\0"}, {"d/.hidden": "x"}, {"d/README.md": ""}])
def test_a_folder_without_text_is_refused(write: Write, files: dict[str, str | bytes]):
    (write(files) / "d").mkdir(exist_ok=True)
    assert error_of("d").found == "The folder d holds no text file."


def test_a_source_file_that_changes_while_it_is_read_is_named(write: Write):
    folder = write({"src/a.py": "a", "src/b.py": "b"})
    source = open_plain("src")
    (folder / "src" / "b.py").unlink()
    with pytest.raises(DataError, match=r"^src/b.py changed while it was read"):
        list(source.rows())


# Content


@pytest.mark.parametrize("files", [{"d/f.jsonl": ROW, "d/g.jsonl": ROW}, {"d/f.py": "a", "d/g.py": "b"}])
def test_the_same_content_has_the_same_key_wherever_it_lies(write: Write, files: dict[str, str | bytes]):
    folder = write(files)
    key = open_plain("d").content_key()
    shutil.copytree(folder / "d", folder / "other" / "place")
    assert open_plain("other/place").content_key() == key


def test_any_change_of_content_changes_the_key(write: Write):
    folder = write({"d/f.jsonl": ROW * 2, "d/g.jsonl": ROW, "src/a.py": "ab", "src/b.py": "c"})

    def keys() -> list[str]:
        return [open_plain("d").content_key(), open_plain("src").content_key()]

    seen = [keys()]
    write({"d/g.jsonl": ROW.replace("b", "c"), "src/b.py": "d"})
    seen.append(keys())
    write({"d/f.jsonl": ROW, "d/g.jsonl": ROW * 2, "src/a.py": "a", "src/b.py": "bd"})
    seen.append(keys())
    (folder / "src" / "b.py").rename(folder / "src" / "c.py")
    (folder / "d" / "g.jsonl").rename(folder / "d" / "g.json")
    seen.append(keys())
    for of_one in zip(*seen, strict=True):
        assert len(set(of_one)) == len(seen)


def test_left_out_files_are_no_content(write: Write):
    folder = write({"src/a.py": "a"})
    key = SourceFolder("src", folder / "src").content_key()
    write({"src/b.png": b"\0"})
    assert SourceFolder("src", folder / "src").content_key() == key
