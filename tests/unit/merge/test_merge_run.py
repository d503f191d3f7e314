"""`dsft merge` from command line to folder: which adapter, what is written, what a failure leaves."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dsft.merge.write
from dsft.cli.app import main
from dsft.core.errors import OutputFolderError
from dsft.merge.setup import MergeSetup
from dsft.merge.target import written
from dsft.train.checkpoint import find_damage, replace_folder
from dsft.train.folders import RunFolders, locked
from dsft.train.save import save_final_adapter
from tests.scripted_models import BOS, EOS, TURN_END, write_adapter, write_random_model, write_scripted_model
from tests.train_results import make_result

Capture = pytest.CaptureFixture[str]

CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}"
    "{{ '" + TURN_END + "' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_adapter(folder / "adapter", write_random_model(folder / "random"))
    write_scripted_model(folder / "chat", "Hi!", chat_template=CHAT_TEMPLATE)
    write_adapter(folder / "chat_adapter", folder / "chat", template="chat")
    return folder


@pytest.fixture
def work(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base in `base` and an adapter in `trained_x`, which names its base by that path."""
    shutil.copytree(models / "random", tmp_path / "base")
    shutil.copytree(models / "adapter", tmp_path / "trained_x")
    change_json(tmp_path / "trained_x" / "training_summary.json", model={"name": "./base", "revision": None})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


def infer(capsys: Capture, model: Path, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    words = ["--model", str(model), "--max-new-tokens", "30", "--device", "cpu", "--json", *options]
    assert main(["infer", "Sort a list.", *words]) == 0
    captured = capsys.readouterr()
    return {"err": captured.err, **json.loads(captured.out.splitlines()[-1])}


def last_object(capsys: Capture) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return record


def test_the_newest_finished_run_is_taken_without_an_argument(work: Path, capsys: Capture) -> None:
    shutil.copytree("trained_x", "trained_a")
    shutil.copytree("trained_x", "trained_unfinished")
    Path("trained_unfinished/training_summary.json").unlink()
    os.utime("trained_a/training_summary.json", (1, 1))
    assert main(["merge"]) == 0
    captured = capsys.readouterr()
    assert "note: Adapter: ./trained_x, the newest finished run." in captured.err
    assert "trained_x/merged_model is written" in captured.out
    assert [path.parent.name for path in work.glob("*/merged_model")] == ["trained_x"]


def test_a_merged_model_is_no_run_to_merge(work: Path, capsys: Capture) -> None:
    """One that lies beside the runs under such a name has the newest record of all."""
    assert main(["merge", "trained_x", "--output", "trained_merged", "--no-verify", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["merge", "--quiet", "--no-verify"]) == 0
    assert Path("trained_x/merged_model").is_dir()


@pytest.mark.parametrize("adapter", ["base", "base/"])
def test_a_whole_model_is_no_adapter(work: Path, capsys: Capture, adapter: str) -> None:
    assert main(["merge", adapter]) == 2
    assert f"{adapter} is no adapter (it has no adapter_config.json)" in capsys.readouterr().err
    assert sorted(path.name for path in work.iterdir()) == ["base", "trained_x"]


def test_a_folder_that_is_not_there_is_told(work: Path, capsys: Capture) -> None:
    assert main(["merge", "./nothing"]) == 2
    assert "There is no folder ./nothing." in capsys.readouterr().err


def test_a_checkpoint_is_merged_and_stays_whole_and_its_folder_names_it(work: Path, capsys: Capture) -> None:
    adapter, run = Path("trained_x"), Path("results_x")
    names = ("adapter_config.json", "adapter_model.safetensors")
    replace_folder(
        run / "checkpoint-5", lambda folder: [shutil.copy(adapter / name, folder / name) for name in names] and None
    )
    (run / "run.json").write_text(json.dumps({"template": "instruction", "model": {"name": "./base"}}))
    assert main(["merge", "results_x"]) == 2
    assert "results_x/checkpoint-5" in capsys.readouterr().err
    assert main(["merge", "results_x/checkpoint-5", "--json"]) == 0
    told = last_object(capsys)
    assert (told["template"], told["base"]) == ("instruction", "./base")
    assert Path("results_x/checkpoint-5/merged_model/chat_template.jinja").is_file()
    assert find_damage(run / "checkpoint-5") is None


def test_an_adapter_of_peft_alone_takes_the_base_s_tokenizer(work: Path, models: Path, capsys: Capture) -> None:
    for name in ("training_summary.json", *TOKENIZER_FILES):
        Path("trained_x", name).unlink()
    assert main(["merge", "trained_x", "--json"]) == 0
    told = last_object(capsys)
    assert told["base"] == str(models / "random")  # as PEFT wrote it
    assert told["template"] is None
    merged = Path("trained_x/merged_model")
    for name in TOKENIZER_FILES:
        assert (merged / name).read_bytes() == (models / "random" / name).read_bytes()
    assert not (merged / "chat_template.jinja").exists()


def test_a_base_of_another_name_is_refused_and_taken_with_force(work: Path, capsys: Capture) -> None:
    Path("base").rename("other")
    assert main(["merge", "trained_x", "--base", "other"]) == 2
    error = capsys.readouterr().err
    assert "was trained on ./base" in error and "--force" in error
    assert not Path("trained_x/merged_model").exists()
    assert main(["merge", "trained_x", "--base", "other", "--force", "--quiet"]) == 0


def test_what_is_recorded_is_what_json_prints_last(work: Path, capsys: Capture) -> None:
    assert main(["merge", "trained_x", "--json"]) == 0
    told = last_object(capsys)
    assert told.pop("event") == "MergeResult"
    merged = Path("trained_x/merged_model")
    assert read_json(merged / "merge_summary.json") == told
    assert (told["adapter"], told["base"], told["output"]) == ("trained_x", "./base", str(merged))
    assert (told["dtype"], told["base_rounding"], told["device"]) == ("bfloat16", "none", "cpu")
    tensors = load_file(merged / "model.safetensors")
    assert told["shards"] == ["model.safetensors"]
    assert told["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert told["weight_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert told["num_updated_tensors"] == 14  # seven linear layers in each of two blocks
    assert 0.99 < told["update_kept"] < 1.01
    verification = told["verification"]
    assert 0 < verification["mean_difference"] < verification["max_difference"]
    assert told["verify_s"] > 0 and told["gguf_s"] is None


def test_without_verification_none_is_claimed(work: Path, capsys: Capture) -> None:
    assert main(["merge", "trained_x", "--no-verify", "--json"]) == 0
    told = last_object(capsys)
    assert (told["verification"], told["verify_s"]) == (None, None)
    assert "not compared" in Path("trained_x/merged_model/README.md").read_text()


def test_the_folder_is_a_model_to_transformers(work: Path) -> None:
    assert main(["merge", "trained_x", "--quiet"]) == 0
    merged = Path("trained_x/merged_model")
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md", "merge_summary.json"}
    assert {path.name for path in merged.iterdir()} == expected | {*TOKENIZER_FILES, "chat_template.jinja"}
    model, info = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    base, own = read_json(Path("base/config.json")), read_json(merged / "config.json")
    for key in ("dtype", "torch_dtype"):
        base.pop(key, None)
    assert own.pop("torch_dtype") == "bfloat16"
    assert own == base
    assert AutoConfig.from_pretrained(merged).vocab_size == base["vocab_size"]


def test_the_tokenizer_s_files_are_the_adapter_s_to_the_byte(work: Path) -> None:
    assert main(["merge", "trained_x", "--quiet", "--no-verify"]) == 0
    for name in TOKENIZER_FILES:
        assert Path("trained_x/merged_model", name).read_bytes() == Path("trained_x", name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained("trained_x/merged_model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Sort."}], return_dict=False)
    own = AutoTokenizer.from_pretrained("trained_x")
    assert ids == own("### Instruction:\nSort.\n\n### Response:\n")["input_ids"]


def test_every_token_that_ends_an_answer_is_a_stop_token(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    assert main(["merge", str(models / "chat_adapter"), "--output", str(output), "--quiet", "--no-verify"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(output)
    bos, eos, end = tokenizer.convert_tokens_to_ids([BOS, EOS, TURN_END])
    settings = GenerationConfig.from_pretrained(output)
    assert settings.bos_token_id == bos
    assert settings.eos_token_id == [eos, end]
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_infer_answers_from_it_as_from_the_adapter(work: Path, capsys: Capture) -> None:
    """The template is found in the merged folder, wherever it is."""
    assert main(["merge", "trained_x", "--output", "far/away", "--dtype", "float32", "--quiet"]) == 0
    assert main(["merge", "trained_x", "--dtype", "float32", "--quiet"]) == 0
    expected = infer(capsys, Path("trained_x"))
    assert expected["num_new_tokens"] > 5
    for merged in (Path("far/away"), Path("trained_x/merged_model")):
        answer = infer(capsys, merged)
        assert (answer["text"], answer["num_prompt_tokens"]) == (expected["text"], expected["num_prompt_tokens"])
        assert (answer["template"], answer["base"], answer["err"].count("note:")) == ("instruction", None, 0)
    assert infer(capsys, Path("base"))["text"] != expected["text"]


def test_infer_ends_a_merged_chat_model_s_answer_where_the_adapter_s_ends(
    models: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "merged"
    assert main(["merge", str(models / "chat_adapter"), "--output", str(output), "--dtype", "float32", "--quiet"]) == 0
    expected, answer = infer(capsys, models / "chat_adapter"), infer(capsys, output)
    assert answer["text"] == expected["text"]
    assert (answer["template"], answer["stop_reason"]) == ("chat", expected["stop_reason"])


def test_no_path_of_this_machine_is_written(work: Path) -> None:
    assert main(["merge", "trained_x", "--output", "out", "--quiet"]) == 0
    for path in Path("out").iterdir():
        assert str(work).encode() not in path.read_bytes(), path.name


def test_no_path_of_this_machine_is_in_the_card(work: Path) -> None:
    assert main(["merge", str(work / "trained_x"), "--output", str(work / "out"), "--quiet"]) == 0
    for path in Path("out").iterdir():
        if path.name != "merge_summary.json":  # says what was typed
            assert str(work).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_may_be_read_by_whom_new_files_may(work: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        assert main(["merge", "trained_x", "--quiet", "--no-verify"]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in Path("trained_x/merged_model").iterdir()} == {mode}


def test_adapter_and_base_are_not_touched(work: Path) -> None:
    before = snapshot(work / "base"), snapshot(work / "trained_x")
    assert main(["merge", "trained_x", "--output", "a/b/out/", "--quiet"]) == 0
    assert (snapshot(work / "base"), snapshot(work / "trained_x")) == before
    assert [path.name for path in Path("a/b").iterdir()] == ["out"]


def test_adapter_and_output_may_begin_at_home(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HOME", str(work))
    assert main(["merge", "~/trained_x", "--output", "~/out", "--quiet", "--no-verify"]) == 0
    assert (work / "out" / "config.json").is_file()
    assert not Path("~").exists()


def test_a_merged_model_is_replaced_only_when_asked(work: Path, capsys: Capture) -> None:
    command = ["merge", "trained_x", "--quiet", "--no-verify"]
    assert main(command) == 0
    before = snapshot(work)
    assert main([*command, "--dtype", "float16"]) == 2
    assert "already holds a merged model" in capsys.readouterr().err
    assert snapshot(work) == before
    assert main([*command, "--dtype", "float16", "--overwrite"]) == 0
    assert load_file("trained_x/merged_model/model.safetensors")["lm_head.weight"].dtype == torch.float16


@pytest.mark.parametrize("output", ["base", "trained_x", ".", "mine", "mine/file"])
def test_a_folder_of_something_else_is_never_written_to(work: Path, capsys: Capture, output: str) -> None:
    Path("mine").mkdir()
    Path("mine/file").touch()
    before = snapshot(work)
    for options in ([], ["--overwrite"]):
        assert main(["merge", "trained_x", "--output", output, *options]) == 2
        assert "error: " in capsys.readouterr().err
        assert snapshot(work) == before


def fail_at_piece(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from dsft.merge import shards

        as_bytes, num_pieces = shards._as_bytes, 0

        def write(piece: torch.Tensor) -> memoryview:
            nonlocal num_pieces
            num_pieces += 1
            if num_pieces == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return as_bytes(piece)

        monkeypatch.setattr(shards, "_as_bytes", write)

    return patch


def fail_at_file(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        write_text = Path.write_text

        def write(path: Path, text: str, **settings: Any) -> int:
            if path.name == name:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write_text(path, text, **settings)

        monkeypatch.setattr(Path, "write_text", write)

    return patch


FULL_DISKS = {
    "first piece": fail_at_piece(1),
    "tenth piece": fail_at_piece(10),
    **{name: fail_at_file(name) for name in ("config.json.unproved", "README.md", "merge_summary.json")},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", FULL_DISKS)
def test_a_disk_that_becomes_full_leaves_what_was_there(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, moment: str, overwrite: bool
) -> None:
    command = ["merge", "trained_x", "--output", "a/b/out", "--no-verify", "--overwrite"]
    if overwrite:
        assert main([*command, "--quiet"]) == 0
    before = {name: content for name, (content, _) in snapshot(work).items()}
    FULL_DISKS[moment](monkeypatch)
    capsys.readouterr()
    assert main([*command, "--json"]) == 1
    error = last_object(capsys)["error"]
    assert error["kind"] == "WriteError"
    assert error["found"].startswith("a/b/out can't be written: [Errno 28] No space left on device")
    assert error["found"].endswith("GiB free there).")
    assert {name: content for name, (content, _) in snapshot(work).items()} == before


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_system_refuses_leaves_nothing(work: Path, capsys: Capture) -> None:
    before = snapshot(work).keys()
    with file_limit(100_000):
        assert main(["merge", "trained_x", "--quiet"]) == 1
    assert "error: trained_x/merged_model can't be written: [Errno 27] File too large" in capsys.readouterr().err
    assert snapshot(work).keys() == before


def test_a_disk_without_room_is_told_with_figures_before_anything_is_written(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = snapshot(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    assert main(["merge", "trained_x"]) == 1
    error = capsys.readouterr().err
    assert f"error: {work / 'trained_x'} has 0.0 GiB free, and the merged model takes 0.1 GiB." in error
    assert "--output" in error
    assert snapshot(work) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_weights_that_the_disk_has_changed_are_found_and_go(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, overwrite: bool
) -> None:
    if overwrite:
        assert main(["merge", "trained_x", "--quiet", "--no-verify"]) == 0
    before = {name: content for name, (content, _) in snapshot(work).items()}

    write = dsft.merge.write.write_configuration

    def damage(setup: MergeSetup, folder: Path) -> None:
        write(setup, folder)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-50_000, os.SEEK_END)
            file.write(b"\x3f" * 20_000)

    monkeypatch.setattr("dsft.merge.write.write_configuration", damage)
    assert main(["merge", "trained_x", "--quiet", "--overwrite"]) == 1
    assert "The merged model does not compute what base and adapter do" in capsys.readouterr().err
    assert {name: content for name, (content, _) in snapshot(work).items()} == before


def test_a_merge_of_an_adapter_that_is_being_trained_is_refused(work: Path, capsys: Capture) -> None:
    with locked(RunFolders(work / "results_x", work / "trained_x")):
        before = snapshot(work)
        assert main(["merge", "trained_x"]) == 2
        assert "Another dsft command is writing into trained_x now." in capsys.readouterr().err
        assert snapshot(work) == before
    assert main(["merge", "trained_x", "--quiet", "--no-verify"]) == 0


def test_a_run_does_not_train_an_adapter_that_is_being_merged(work: Path) -> None:
    adapter = work / "trained_x"
    with (
        written(adapter / "merged_model", adapter, overwrite=False),
        pytest.raises(OutputFolderError, match="trained_x now"),
        locked(RunFolders(work / "results_x", adapter)),
    ):
        pass


def test_a_new_run_into_the_folder_removes_the_model_of_the_old_adapter(work: Path) -> None:
    """What a killed merge left goes too: the next merge would put an older model back as if it were the new run's."""
    adapter = work / "trained_x"
    assert main(["merge", "trained_x", "--quiet", "--no-verify"]) == 0
    for leftover in (".merged_model.old", ".merged_model.writing"):
        shutil.copytree(adapter / "merged_model", adapter / leftover)
    trainer: Any = SimpleNamespace(save_adapter=lambda folder: shutil.copy(work / "new.json", folder / CONFIG))
    shutil.copy(adapter / CONFIG, work / "new.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    save_final_adapter(make_result(kept="last"), trainer, tokenizer, RunFolders(work / "results_x", adapter))
    assert (adapter / CONFIG).is_file()
    assert not [path.name for path in adapter.iterdir() if "merged_model" in path.name]
