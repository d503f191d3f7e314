"""Which model a verb takes: the newest finished run, its recorded base and template, and what is said without them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dsft.core.errors import ConfigError, ModelError, UnreachableHubError
from dsft.core.models.find_run import choose_model, find_base, find_newest_run, find_tokenizer


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def make_run(
    folder: Path, base: str | None = "there", trained_at_s: int | None = 1000, recorded_name: str | None = None
) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    if trained_at_s is not None:
        model = {} if recorded_name is None else {"name": recorded_name, "revision": None}
        summary = folder / "training_summary.json"
        summary.write_text(json.dumps({"template": "deepseek", "model": model}))
        os.utime(summary, (trained_at_s, trained_at_s))
    return folder


def test_the_newest_finished_run_is_found(tmp_path: Path) -> None:
    make_run(tmp_path / "trained_a", trained_at_s=3000)
    make_run(tmp_path / "trained_b", trained_at_s=5000)
    make_run(tmp_path / "trained_c", trained_at_s=4000)
    make_run(tmp_path / "trained_broken_off", trained_at_s=None)
    make_run(tmp_path / "results_x", trained_at_s=9000)
    (tmp_path / "trained_empty").mkdir()
    assert find_newest_run(tmp_path) == tmp_path / "trained_b"
    assert choose_model(None, None, tmp_path).name == "./trained_b"


def test_a_merged_run_counts_as_a_run(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "trained_merged")
    (folder / "training_summary.json").write_text('{"template": "instruction"}')
    choice = choose_model(None, None, tmp_path)
    assert (choice.adapter_dir, choice.template) == (None, "instruction")
    assert find_base(choice)[0].location == str(folder)


@pytest.mark.parametrize(("option", "named"), [("--model", ": --model FOLDER."), (None, ": FOLDER.")])
def test_no_run_says_what_to_do(tmp_path: Path, option: str | None, named: str) -> None:
    with pytest.raises(ModelError, match="no finished run") as caught:
        choose_model(None, None, tmp_path, option)
    assert "dsft train" in caught.value.fix
    assert caught.value.fix.endswith(named)


@pytest.mark.parametrize(("option", "named"), [("--model", ": --model ./trained_x."), (None, ": ./trained_x.")])
def test_an_unfinished_run_is_not_taken_silently(tmp_path: Path, option: str | None, named: str) -> None:
    make_run(tmp_path / "trained_x", trained_at_s=None)
    with pytest.raises(ModelError, match=r"trained_x has no training_summary\.json") as caught:
        choose_model(None, None, tmp_path, option)
    assert caught.value.fix.endswith(named)


def test_a_checkpoint_and_a_merged_model_are_answered_as_their_run_says(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "checkpoint-5", base="/gone", trained_at_s=None)
    base = make_model(tmp_path / "base")
    record = {"template": "deepseek", "model": {"name": str(base), "revision": None}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    choice = choose_model(str(checkpoint), None, tmp_path)
    assert choice.template == "deepseek"
    assert find_base(choice)[0].location == str(base)
    assert choose_model(str(base), None, tmp_path).template is None, "a base model beside it is not of that run"

    run = make_run(tmp_path / "trained_x")
    merged = make_model(run / "merged_model")
    assert choose_model(str(merged), None, tmp_path).template == "deepseek"


def test_a_merged_models_own_record_goes_before_the_run_it_lies_in(tmp_path: Path) -> None:
    elsewhere = make_model(tmp_path / "served")
    (elsewhere / "merge_summary.json").write_text('{"template": "instruction", "base": "some/model"}')
    choice = choose_model(str(elsewhere), None, tmp_path)
    assert (choice.adapter_dir, choice.template, choice.fingerprint) == (None, "instruction", None)

    merged = make_model(make_run(tmp_path / "trained_x") / "merged_model")
    (merged / "merge_summary.json").write_text('{"template": "fim"}')
    assert choose_model(str(merged), None, tmp_path).template == "fim"
    (merged / "merge_summary.json").write_text('{"template": null}')
    assert choose_model(str(merged), None, tmp_path).template is None


def test_a_run_tells_what_its_base_was_known_by_and_the_type_it_computed_in(tmp_path: Path) -> None:
    run = make_run(tmp_path / "trained_x", recorded_name="some/model")
    choice = choose_model(str(run), None, tmp_path)
    assert (choice.fingerprint, choice.precision) == (None, None)
    summary: dict[str, Any] = {"model": {"name": "some/model", "fingerprint": "abc", "precision": "fp16"}}
    (run / "training_summary.json").write_text(json.dumps(summary))
    choice = choose_model(str(run), "other/model", tmp_path)
    assert (choice.fingerprint, choice.precision) == ("abc", "fp16")
    summary["model"]["precision"] = "auto"
    (run / "training_summary.json").write_text(json.dumps(summary))
    assert choose_model(str(run), None, tmp_path).precision is None

    checkpoint = make_run(tmp_path / "checkpoint-5", trained_at_s=None)
    (tmp_path / "run.json").write_text('{"model": {"name": "some/model", "fingerprint": "abc"}}')
    assert choose_model(str(checkpoint), None, tmp_path).fingerprint == "abc"


def test_what_was_recorded_is_told_beside_another_base(tmp_path: Path) -> None:
    run = make_run(tmp_path / "trained_x", base="from/peft", recorded_name="from/run")
    choice = choose_model(str(run), "other/model", tmp_path)
    assert [base.name for base in choice.bases] == ["other/model"]
    assert [base.name for base in choice.recorded_bases] == ["from/run", "from/peft"]
    unnamed = make_run(tmp_path / "trained_y", base=None)
    assert choose_model(str(unnamed), "other/model", tmp_path).recorded_bases == ()


def test_a_folder_of_checkpoints_names_them(tmp_path: Path) -> None:
    for name in ("checkpoint-50", "checkpoint-100", "checkpoint-900.damaged", ".checkpoint-7.writing", "adapter-best"):
        make_run(tmp_path / name, trained_at_s=None)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="folder of checkpoints") as caught:
        choose_model(str(tmp_path), None, tmp_path, "--model")
    assert "(checkpoint-50, checkpoint-100), e.g. --model /" in caught.value.fix
    assert caught.value.fix.endswith("/checkpoint-100.")


def test_the_summary_names_base_and_template(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    run = make_run(tmp_path / "trained_x", base="/gone", recorded_name=str(base))
    choice = choose_model(str(run), None, tmp_path)
    source, name = find_base(choice)
    assert (source.location, name, choice.template) == (str(base), choice.bases[0], "deepseek")


def test_the_adapters_own_record_serves_where_the_summarys_name_leads_nowhere(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    run = make_run(tmp_path / "trained_x", base=str(base), recorded_name="./relative/to/another/folder")
    source, name = find_base(choose_model(str(run), None, tmp_path))
    assert (source.location, name.origin) == (str(base), "adapter_config.json")


def test_an_adapter_without_summary_has_its_own_record_alone(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    choice = choose_model(str(make_run(tmp_path / "x", base=str(base), trained_at_s=None)), None, tmp_path)
    assert choice.template is None
    assert find_base(choice)[0].location == str(base)


def test_base_overrides_what_is_recorded(tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    run = make_run(tmp_path / "trained_x", base=str(make_model(tmp_path / "base")))
    assert find_base(choose_model(str(run), str(other), tmp_path))[0].location == str(other)


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "trained_x", base="/gone/base", recorded_name="./gone/too")
    with pytest.raises(ModelError, match=r"trained_x, \./gone/too or /gone/base, is not there") as caught:
        find_base(choose_model(str(run), None, tmp_path))
    assert "--base" in caught.value.fix


def test_a_base_that_only_the_hub_has_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "trained_x", base="some/model")
    with pytest.raises(UnreachableHubError, match=r"trained_x, some/model, is not there"):
        find_base(choose_model(str(run), None, tmp_path))


def test_base_is_for_adapters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter folder"):
        choose_model(str(make_model(tmp_path / "model")), "other", tmp_path)


@pytest.mark.parametrize(
    ("model", "base", "option", "found"),
    [
        ("", None, "--model", "--model is empty."),
        (" ", None, None, "The model's name is empty."),
        ("./x", "", "--model", "--base is empty."),
        (None, "", "--model", "--base is empty."),
    ],
)
def test_an_empty_name_is_not_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | None, base: str | None, option: str | None, found: str
) -> None:
    make_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        choose_model(model, base, tmp_path, option)
    assert caught.value.found == found


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nothing"])
def test_a_missing_model_is_told_without_a_flag_of_training(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no model folder") as caught:
        find_base(choose_model(name, None, tmp_path))
    assert "--model-name" not in str(caught.value)
    assert "adapter folder" in caught.value.fix


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", "{", "adapter_config.json can't be read"),
        ("adapter_config.json", "[]", "no JSON object"),
        ("adapter_config.json", '{"peft_type": "IA3"}', "IA3 adapter"),
        ("training_summary.json", '{"template": "chat"', "training_summary.json can't be read"),
        ("training_summary.json", '{"template": 7}', "the prompt template 7"),
    ],
)
def test_damaged_records_are_told(tmp_path: Path, file: str, content: str, message: str) -> None:
    run = make_run(tmp_path / "trained_x")
    (run / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        choose_model(str(run), None, tmp_path)


def test_an_adapter_that_records_no_base_asks_for_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "trained_x", base=None)
    with pytest.raises(ModelError, match="which base model"):
        choose_model(str(run), None, tmp_path)


def test_the_tokenizer_is_the_adapters_where_it_has_one(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    run = make_run(tmp_path / "trained_x", base=str(base))
    choice = choose_model(str(run), None, tmp_path)
    source, _ = find_base(choice)
    assert find_tokenizer(choice, source).location == str(base)
    (run / "tokenizer.json").touch()
    assert find_tokenizer(choice, source).location == str(run)


def test_a_builtin_model_is_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dsft.core.paths as paths

    make_model(tmp_path / "presets" / "tiny" / "model")
    monkeypatch.setattr(paths, "presets_dir", lambda: tmp_path / "presets")
    choice: Any = choose_model("builtin:tiny/model", None, tmp_path)
    assert choice.adapter_dir is None
    assert find_base(choice)[0].location == str(tmp_path / "presets" / "tiny" / "model")
