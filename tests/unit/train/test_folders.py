import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsft.core.errors import OutputFolderError
from dsft.train.checkpoint import write_checkpoint
from dsft.train.folders import RunFolders, RunInputs, check_folders, check_same_inputs, locked, prepare_folders

RECIPE = {"lora_r": 8, "learning_rate": 2e-4}
INPUTS = RunInputs(data="data", model="weights", optimizer="torch")


@pytest.fixture
def folders(tmp_path: Path) -> RunFolders:
    return RunFolders(tmp_path / "results", tmp_path / "trained")


def start(folders: RunFolders) -> None:
    folders.output_dir.mkdir()
    prepare_folders(folders, resume=False, recipe=RECIPE, inputs=INPUTS, facts={})
    write_checkpoint(folders.output_dir, 5, lambda folder: None)


def check(folders: RunFolders, *, resume: bool = False, overwrite: bool = False, recipe=RECIPE) -> None:
    check_folders(folders, resume=resume, overwrite=overwrite, recipe=recipe)


def test_new_folders_are_free(folders: RunFolders):
    check(folders)
    assert not folders.output_dir.exists()


def test_a_folder_with_a_run_is_refused_naming_both_ways_on(folders: RunFolders):
    start(folders)
    with pytest.raises(OutputFolderError, match=r"already holds a run.*--resume.*--overwrite"):
        check(folders)
    check(folders, resume=True)
    check(folders, overwrite=True)


def test_a_save_folder_with_a_model_is_refused(folders: RunFolders):
    folders.save_dir.mkdir()
    (folders.save_dir / "adapter_config.json").touch()
    with pytest.raises(OutputFolderError, match=r"trained model.*--resume.*--overwrite"):
        check(folders)


def test_resuming_where_no_run_is_does_not_touch_another_runs_model(folders: RunFolders):
    folders.save_dir.mkdir()
    (folders.save_dir / "adapter_config.json").touch()
    with pytest.raises(OutputFolderError, match="trained model"):
        check(folders, resume=True)


def test_foreign_checkpoints_are_not_resumed(folders: RunFolders):
    (folders.output_dir / "checkpoint-3").mkdir(parents=True)
    for flag in ("resume", "overwrite"):
        with pytest.raises(OutputFolderError, match="not of a dsft run"):
            check(folders, **{flag: True})


def test_a_folder_that_cannot_be_written_is_named(folders: RunFolders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OutputFolderError, match="can't be written"):
        check(folders)


def test_resuming_with_other_settings_names_them(folders: RunFolders):
    start(folders)
    with pytest.raises(OutputFolderError, match="lora_r was 8 and is 16"):
        check(folders, resume=True, recipe=RECIPE | {"lora_r": 16})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": "other"}, r"The data \(or the tokenizer\) has changed"),
        ({"model": "other"}, "The weights of the base model have changed"),
        ({"optimizer": "bitsandbytes"}, "optimizer is now bitsandbytes's, which can't read the state .* of torch's"),
    ],
)
def test_resuming_with_other_inputs_is_refused(folders: RunFolders, change: dict[str, str], expected: str):
    check_same_inputs(folders.output_dir, INPUTS)
    start(folders)
    check_same_inputs(folders.output_dir, INPUTS)
    with pytest.raises(OutputFolderError, match=expected):
        check_same_inputs(folders.output_dir, replace(INPUTS, **change))


def test_resuming_into_the_folder_of_another_model_is_refused(folders: RunFolders, tmp_path: Path):
    start(folders)
    folders.save_dir.mkdir()
    (folders.save_dir / "adapter_config.json").touch()
    check(folders, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").touch()
    with pytest.raises(OutputFolderError, match="trained model"):
        check(RunFolders(folders.output_dir, tmp_path / "other"), resume=True)
    check(RunFolders(folders.output_dir, tmp_path / "new"), resume=True)


def test_a_resumed_run_keeps_its_id_and_an_overwritten_one_does_not(folders: RunFolders):
    folders.output_dir.mkdir()
    first = prepare_folders(folders, resume=False, recipe=RECIPE, inputs=INPUTS, facts={})
    assert prepare_folders(folders, resume=True, recipe=RECIPE, inputs=INPUTS, facts={}) == first
    assert prepare_folders(folders, resume=False, recipe=RECIPE, inputs=INPUTS, facts={}) != first


def test_two_runs_never_write_into_one_folder(folders: RunFolders):
    with locked(folders), pytest.raises(OutputFolderError, match="Another dsft command"), locked(folders):
        pass
    with locked(folders):
        pass


def test_two_runs_never_save_into_one_folder(folders: RunFolders, tmp_path: Path):
    other = RunFolders(tmp_path / "other", folders.save_dir)
    with locked(folders), pytest.raises(OutputFolderError, match="trained now"), locked(other):
        pass


def test_the_save_folder_is_known_from_any_working_folder(
    folders: RunFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a", "b"):
        (tmp_path / name / "trained").mkdir(parents=True)
        (tmp_path / name / "trained" / "adapter_config.json").touch()
    relative = RunFolders(folders.output_dir, Path("trained"))
    folders.output_dir.mkdir()
    monkeypatch.chdir(tmp_path / "a")
    prepare_folders(relative, resume=False, recipe=RECIPE, inputs=INPUTS, facts={})
    check(relative, resume=True)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(OutputFolderError, match="trained model"):
        check(relative, resume=True)
    check(RunFolders(folders.output_dir, tmp_path / "a" / "trained"), resume=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["config.json", "merged_model"])
def test_a_whole_model_is_never_written_into(folders: RunFolders, name: str, overwrite: bool):
    (folders.save_dir / name).mkdir(parents=True)
    with pytest.raises(OutputFolderError, match=name):
        check(folders, overwrite=overwrite)


def test_a_folder_made_for_nothing_is_removed_again(tmp_path: Path):
    folders = RunFolders(tmp_path / "a" / "b", tmp_path / "c")
    with locked(folders):
        assert folders.output_dir.is_dir() and folders.save_dir.is_dir()
    assert not list(tmp_path.iterdir())
    with locked(folders):
        (folders.output_dir / "file").touch()
    assert (folders.output_dir / "file").exists()
    assert not folders.save_dir.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    with pytest.raises(OutputFolderError, match="/proc/x can't be made"), locked(RunFolders(tmp_path, Path("/proc/x"))):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_user_s_own_readme_is_not_replaced(folders: RunFolders, overwrite: bool):
    folders.save_dir.mkdir()
    (folders.save_dir / "README.md").write_text("# my project")
    with pytest.raises(OutputFolderError, match=r"holds README\.md and is no folder of a run"):
        check(folders, overwrite=overwrite)


def test_a_link_to_nowhere_is_refused(folders: RunFolders, tmp_path: Path):
    folders.output_dir.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputFolderError, match="link"):
        check(folders)


def test_overwriting_removes_the_runs_own_files_only(folders: RunFolders):
    start(folders)
    mine = folders.output_dir / "notes.txt"
    mine.write_text("keep")
    (folders.output_dir / "checkpoint-4.damaged").mkdir()
    prepare_folders(folders, resume=False, recipe=RECIPE, inputs=INPUTS, facts={})
    assert {path.name for path in folders.output_dir.iterdir()} == {"notes.txt", "run.json"}


def test_resuming_keeps_checkpoints(folders: RunFolders):
    start(folders)
    prepare_folders(folders, resume=True, recipe=RECIPE, inputs=INPUTS, facts={})
    assert (folders.output_dir / "checkpoint-5").is_dir()


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"other": 1})])
def test_a_damaged_record_is_no_traceback(folders: RunFolders, content: str):
    start(folders)
    (folders.output_dir / "run.json").write_text(content)
    with pytest.raises(OutputFolderError, match="damaged"):
        check(folders, resume=True)


def test_a_file_or_one_folder_for_both_is_refused(folders: RunFolders, tmp_path: Path):
    folders.output_dir.write_text("")
    with pytest.raises(OutputFolderError, match="is a file"):
        check(folders)
    with pytest.raises(OutputFolderError, match="both"):
        check(RunFolders(tmp_path / "x", tmp_path / "x"))
