"""Where a merged model may go, what may be replaced there, and what is left when writing it fails."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsft.core import staging as staging_module
from dsft.core.errors import OutputFolderError, WriteError
from dsft.core.locks import held
from dsft.core.units import GIB
from dsft.merge import target as target_module
from dsft.merge.target import SMALL_FILES_BYTES, check_room, find_target, written


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "work" / "trained_x"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    return folder


def make_merged(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    for name in ("merge_summary.json", "config.json", "model.safetensors"):
        (folder / name).write_text(content)
    return folder


def write_model(
    target: Path,
    adapter: Path,
    *,
    overwrite: bool = False,
    then: Callable[[], object] | None = None,
    on_complete: Callable[[], None] = lambda: None,
):
    with written(target, adapter, overwrite=overwrite, on_complete=on_complete) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new")
        if then is not None:
            then()


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def fail(error: BaseException) -> None:
    raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_output_it_is_merged_model_in_the_adapter_s_folder(adapter: Path) -> None:
    assert find_target(adapter, None, None, overwrite=False) == adapter / "merged_model"
    assert not names(adapter)


@pytest.mark.parametrize("output", ["out", "out/", "./out", "deep/er/out", "../out"])
def test_output_may_be_relative_and_end_in_a_slash(adapter: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.chdir(adapter.parent)
    assert find_target(adapter, Path(output), None, overwrite=False) == Path(output)
    assert names(adapter.parent) == ["trained_x"]


def test_output_may_begin_at_home(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_target(adapter, Path("~/out"), None, overwrite=False) == tmp_path / "out"


@pytest.mark.parametrize("output", [".", "..", "/", "out/..", "./"])
def test_a_path_without_a_name_of_its_own_is_refused(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(adapter.parent)
    with pytest.raises(OutputFolderError, match=r"does not say the folder's own name"):
        find_target(adapter, Path(output), None, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_and_a_link_are_refused(adapter: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("mine")
    make_merged(tmp_path / "merged")
    (tmp_path / "link").symlink_to(tmp_path / "merged")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    for name, reason in (("file", "is not a folder"), ("link", "is a link"), ("nowhere", "is a link")):
        with pytest.raises(OutputFolderError, match=rf"{name} {reason}.*--output"):
            find_target(adapter, tmp_path / name, None, overwrite=overwrite)
    assert content(tmp_path / "merged")["config.json"] == "old"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_a_file_is_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputFolderError, match=r"file is not a folder, and .*file/a/out belongs there"):
        find_target(adapter, tmp_path / "file" / "a" / "out", None, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("above", [0, 1])
def test_the_folder_of_adapter_or_base_and_those_around_it_are_refused(
    adapter: Path, base: Path, above: int, overwrite: bool
) -> None:
    for folder, whose in ((adapter, "the adapter"), (base, "the base model")):
        place = (folder, *folder.parents)[above]
        (place / "merge_summary.json").touch()
        with pytest.raises(OutputFolderError, match=f"is the folder of {whose}, or around it"):
            find_target(adapter, place, base, overwrite=overwrite)


def test_the_adapter_s_folder_is_known_by_another_path(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(adapter.parent)
    with pytest.raises(OutputFolderError, match="is the folder of the adapter"):
        find_target(adapter, tmp_path / "other" / "trained_x", None, overwrite=True)


def test_a_folder_in_the_base_s_is_taken(adapter: Path, base: Path) -> None:
    assert find_target(adapter, base / "merged", base, overwrite=False) == base / "merged"


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_replaced(adapter: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(OutputFolderError, match="holds files that `dsft merge` did not write"):
        find_target(adapter, tmp_path / "out", None, overwrite=overwrite)
    assert content(tmp_path / "out") == {"config.json": "mine"}


def test_a_merged_model_is_replaced_only_when_asked(adapter: Path) -> None:
    merged = make_merged(adapter / "merged_model")
    with pytest.raises(OutputFolderError, match=r"already holds a merged model.*--overwrite.*--output"):
        find_target(adapter, None, None, overwrite=False)
    assert find_target(adapter, None, None, overwrite=True) == merged
    assert content(merged)["config.json"] == "old"


def test_an_empty_folder_is_taken(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert find_target(adapter, tmp_path / "out", None, overwrite=False) == tmp_path / "out"
    write_model(tmp_path / "out", adapter)
    assert content(tmp_path / "out") == {"config.json": "new", "model.safetensors": "new"}


def test_a_mount_point_is_refused_with_a_folder_that_will_do(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(OutputFolderError, match=r"file system is mounted\. Choose .*volume/merged_model"):
        find_target(adapter, tmp_path / "volume", None, overwrite=False)
    target = tmp_path / "volume" / "merged_model"
    assert find_target(adapter, target, None, overwrite=False) == target


def test_the_root_and_proc_are_mount_points_to_python(adapter: Path) -> None:
    with pytest.raises(OutputFolderError, match="mounted"):
        find_target(adapter, Path("/proc"), None, overwrite=False)


def test_a_place_that_can_t_be_written_is_told_before_anything_is_read(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed")
    with pytest.raises(OutputFolderError, match=r"closed can't be written, and .*closed/a/out belongs there"):
        find_target(adapter, tmp_path / "closed" / "a" / "out", None, overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_adapter_that_can_t_be_written_to_is_merged_elsewhere(adapter: Path, tmp_path: Path) -> None:
    adapter.chmod(0o555)
    try:
        with pytest.raises(OutputFolderError, match=r"can't be written.*--output"):
            find_target(adapter, None, None, overwrite=False)
        write_model(find_target(adapter, tmp_path / "out", None, overwrite=False), adapter)
    finally:
        adapter.chmod(0o755)
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_a_model_that_a_kill_left_aside_is_found(adapter: Path) -> None:
    make_merged(adapter / ".merged_model.old")
    with pytest.raises(OutputFolderError, match="already holds a merged model"):
        find_target(adapter, None, None, overwrite=False)
    assert names(adapter) == ["merged_model"]


def test_room_counts_small_files_and_what_a_kill_left(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def usage(place: Path) -> SimpleNamespace:
        places.append(place)
        return SimpleNamespace(free=10 * GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    target = tmp_path / "a" / "b" / "out"
    check_room(target, 10 * GIB - SMALL_FILES_BYTES)
    with pytest.raises(WriteError) as caught:
        check_room(target, 12 * GIB)
    assert caught.value.found == f"{tmp_path} has 10.0 GiB free, and the merged model takes 12.1 GiB."
    assert "--output" in caught.value.fix
    assert caught.value.exit_code == 1
    target.mkdir(parents=True)
    check_room(target, 0)
    assert places == [tmp_path, tmp_path, target]

    left = target.with_name(".out.writing") / "model.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"x" * 2**20)
    check_room(target, 10 * GIB - SMALL_FILES_BYTES + 2**20)
    with pytest.raises(WriteError):
        check_room(target, 10 * GIB - SMALL_FILES_BYTES + 2**21)


def test_missing_folders_are_made(adapter: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "a" / "b" / "out", adapter)
    assert content(tmp_path / "a" / "b" / "out") == {"config.json": "new", "model.safetensors": "new"}
    assert names(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(28, "No space left on device")])
def test_a_failure_leaves_nothing_and_no_folder_above(adapter: Path, tmp_path: Path, error: BaseException) -> None:
    before = names(tmp_path)
    with pytest.raises(WriteError if isinstance(error, OSError) else type(error)):
        write_model(tmp_path / "a" / "b" / "out", adapter, then=lambda: fail(error))
    assert names(tmp_path) == before


def test_a_failure_leaves_the_older_model_as_it_is(adapter: Path) -> None:
    merged = make_merged(adapter / "merged_model")
    with pytest.raises(ValueError, match="x"):
        write_model(merged, adapter, overwrite=True, then=lambda: fail(ValueError("x")))
    assert set(content(merged).values()) == {"old"}
    assert names(adapter) == ["merged_model"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_replaced_model_goes_as_a_whole_with_what_was_put_into_it(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(staging_module, "_exchange", lambda first, second: False)
    merged = make_merged(adapter / "merged_model")
    (merged / "my-notes.txt").touch()
    write_model(merged, adapter, overwrite=True)
    assert content(merged) == {"config.json": "new", "model.safetensors": "new"}
    assert names(adapter) == ["merged_model"]


def test_a_model_that_came_in_the_meantime_is_not_replaced(adapter: Path, tmp_path: Path) -> None:
    target = find_target(adapter, tmp_path / "out", None, overwrite=False)
    make_merged(target, "of another merge")
    with pytest.raises(OutputFolderError, match="already holds a merged model"):
        write_model(target, adapter)
    assert set(content(target).values()) == {"of another merge"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_come_while_it_writes_are_not_replaced(adapter: Path, tmp_path: Path, overwrite: bool) -> None:
    def put_files_there() -> None:
        target.mkdir()
        (target / "config.json").write_text("mine")

    target = tmp_path / "out"
    with pytest.raises(OutputFolderError, match="holds files that `dsft merge` did not write"):
        write_model(target, adapter, overwrite=overwrite, then=put_files_there)
    assert content(target) == {"config.json": "mine"}
    assert names(tmp_path) == ["out", "work"]


def test_a_rename_that_fails_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"

    def refuse(path: Path, place: Path) -> None:
        raise OSError(39, "Directory not empty")

    with pytest.raises(WriteError, match=r"out can't be put in its place: .*Directory not empty"):
        write_model(target, adapter, then=lambda: monkeypatch.setattr(Path, "rename", refuse))
    assert not target.exists()
    assert names(tmp_path) == ["work"]


def test_a_failed_second_rename_puts_the_older_model_back(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "_exchange", lambda first, second: False)
    merged = make_merged(adapter / "merged_model")
    rename = Path.rename

    def refuse(path: Path, place: Path) -> Path:
        if path.name == ".merged_model.writing":
            raise OSError(5, "Input/output error")
        return rename(path, place)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(WriteError, match="Input/output error"):
        write_model(merged, adapter, overwrite=True)
    assert set(content(merged).values()) == {"old"}
    assert names(adapter) == ["merged_model"]


def test_a_signal_while_it_is_moved_in_comes_after_it(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = make_merged(adapter / "merged_model")
    exchange = staging_module._exchange

    def exchange_and_signal(first: Path, second: Path) -> bool:
        signal.raise_signal(signal.SIGINT)
        return exchange(first, second)

    monkeypatch.setattr(staging_module, "_exchange", exchange_and_signal)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        write_model(merged, adapter, overwrite=True, on_complete=lambda: told.append("complete"))
    assert told == ["complete"]
    assert set(content(merged).values()) == {"new"}
    assert names(adapter) == ["merged_model"]


def test_what_an_earlier_merge_left_is_removed(adapter: Path) -> None:
    make_merged(adapter / ".merged_model.writing", "half")
    write_model(adapter / "merged_model", adapter)
    assert set(content(adapter / "merged_model").values()) == {"new"}
    assert names(adapter) == ["merged_model"]


@pytest.mark.parametrize("folder", [".", "merged_model", ".merged_model.writing"])
def test_a_folder_that_another_command_holds_is_refused_by_name(adapter: Path, folder: str) -> None:
    """The adapter's is held by its training, the two others by another merge."""
    place = adapter / folder
    if folder != ".":
        make_merged(place)
    before = names(adapter)
    with held(place, ""):
        for attempt in (
            lambda: find_target(adapter, None, None, overwrite=True),
            lambda: write_model(adapter / "merged_model", adapter, overwrite=True),
        ):
            with pytest.raises(OutputFolderError) as caught:
                attempt()
            assert caught.value.found == f"Another dsft command is writing into {place} now."
            assert caught.value.fix == "Wait for its end."
    assert names(adapter) == before
    write_model(adapter / "merged_model", adapter, overwrite=True)


def test_folders_are_held_until_the_model_is_in_its_place(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = make_merged(adapter / "merged_model")
    remove, refused = shutil.rmtree, []

    def look(folder: Path, **settings: bool) -> None:
        for held_folder in (adapter, merged, adapter / ".merged_model.writing"):
            with pytest.raises(OutputFolderError), held(held_folder, ""):
                pass
            refused.append(held_folder)
        remove(folder, **settings)

    write_model(merged, adapter, overwrite=True, then=lambda: monkeypatch.setattr(shutil, "rmtree", look))
    assert len(refused) == 3
    with held(adapter, ""), held(merged, ""):
        pass


def test_an_adapter_is_merged_into_two_places_at_once(adapter: Path, tmp_path: Path) -> None:
    def merge_elsewhere() -> None:
        write_model(find_target(adapter, tmp_path / "out", None, overwrite=False), adapter)
        with pytest.raises(OutputFolderError) as caught, held(adapter, ""):
            pass
        assert caught.value.found == f"Another dsft command is reading {adapter} now."

    write_model(adapter / "merged_model", adapter, then=merge_elsewhere)
    assert content(tmp_path / "out") == content(adapter / "merged_model")


def test_of_two_merges_into_one_place_the_second_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "trained_y"
    other.mkdir()

    def merge_too() -> None:
        for attempt in (find_target, lambda *_, overwrite: write_model(target, other, overwrite=overwrite)):
            with pytest.raises(OutputFolderError) as caught:
                attempt(other, target, None, overwrite=True)
            assert caught.value.found == f"Another dsft command is writing into {tmp_path / '.out.writing'} now."

    target = tmp_path / "out"
    write_model(target, adapter, then=merge_too)
    assert content(target) == {"config.json": "new", "model.safetensors": "new"}
    assert names(tmp_path) == ["out", "trained_y", "work"]


def test_a_merge_that_begins_while_another_does_leaves_its_folder_alone(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found nothing to hold by then."""
    target, other = tmp_path / "a" / "out", tmp_path / "trained_y"
    other.mkdir()
    first = written(target, adapter, overwrite=False)
    stage = target_module.staged

    def begin_the_first_and_stage(*args: object) -> object:
        monkeypatch.setattr(target_module, "staged", stage)
        (first.__enter__() / "config.json").write_text("of the first")
        return stage(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(target_module, "staged", begin_the_first_and_stage)
    with pytest.raises(OutputFolderError, match="is writing into"):
        write_model(target, other)
    first.__exit__(None, None, None)
    assert content(target) == {"config.json": "of the first"}
    assert names(target.parent) == ["out"]


def test_a_merge_that_has_ended_while_another_began_is_not_replaced(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, stage = tmp_path / "out", target_module.staged

    def merge_and_stage(*args: object) -> object:
        make_merged(target, "of another merge")
        return stage(*args)  # type: ignore[arg-type]

    def fail_if_begun() -> None:
        raise AssertionError("minutes of writing for nothing")

    monkeypatch.setattr(target_module, "staged", merge_and_stage)
    with pytest.raises(OutputFolderError, match="already holds a merged model"):
        write_model(target, adapter, then=fail_if_begun)
    assert names(tmp_path) == ["out", "work"]


def test_a_checkpoint_is_held_with_the_folder_of_its_run(adapter: Path, tmp_path: Path) -> None:
    """A run removes its older checkpoints; it holds its folder while it goes on."""
    run = adapter.parent
    (run / "run.json").touch()
    with held(run, ""):
        for attempt in (
            lambda: find_target(adapter, tmp_path / "out", None, overwrite=False),
            lambda: write_model(tmp_path / "out", adapter),
        ):
            with pytest.raises(OutputFolderError) as caught:
                attempt()
            assert caught.value.found == f"Another dsft command is writing into {run} now."

    def run_on() -> None:
        with pytest.raises(OutputFolderError, match=f"is reading {run} now"), held(run, ""):
            pass

    write_model(tmp_path / "out", adapter, then=run_on)
    (run / "run.json").unlink()
    with held(run, ""):
        write_model(tmp_path / "out2", adapter)


@pytest.mark.parametrize("before", [None, "old"])
def test_a_signal_just_before_it_is_moved_in_leaves_nothing(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    def stop(*_: Path) -> None:
        raise KeyboardInterrupt

    if before is not None:
        make_merged(adapter / "merged_model", before)
    left = names(adapter)
    monkeypatch.setattr(target_module, "_move_in", stop)
    with pytest.raises(KeyboardInterrupt):
        write_model(adapter / "merged_model", adapter, overwrite=True)
    assert names(adapter) == left
    if before is not None:
        assert set(content(adapter / "merged_model").values()) == {before}


def test_the_older_model_goes_where_the_disk_fails_after_the_exchange(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    merged = make_merged(adapter / "merged_model")
    with pytest.raises(WriteError, match="Input/output error"):
        write_model(
            merged,
            adapter,
            overwrite=True,
            then=lambda: monkeypatch.setattr(
                target_module, "move_in", lambda first, second: (staging_module._exchange(first, second), refuse(first))
            ),
        )
    assert set(content(merged).values()) == {"new"}
    assert names(adapter) == ["merged_model"]


def test_a_link_under_the_name_to_write_under_goes_and_what_it_leads_to_stays(adapter: Path, tmp_path: Path) -> None:
    mine = make_merged(tmp_path / "mine", "mine")
    (tmp_path / ".out.writing").symlink_to(mine)
    check_room(tmp_path / "out", 0)
    write_model(find_target(adapter, tmp_path / "out", None, overwrite=False), adapter)
    assert set(content(mine).values()) == {"mine"}
    assert content(tmp_path / "out") == {"config.json": "new", "model.safetensors": "new"}
    assert names(tmp_path) == ["mine", "out", "work"]
