import json
from pathlib import Path

import pytest

from dsft.core.errors import ModelError, UnreachableHubError
from dsft.core.models.load import check_trainable
from dsft.core.models.source import ModelSource, find_model, fingerprint_weights


def write_model(folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def test_a_local_folder_is_found(tmp_path: Path):
    source = find_model(str(write_model(tmp_path / "m")))
    assert source.is_local
    assert source.load_arguments == {"local_files_only": True, "trust_remote_code": False}


def test_a_relative_folder_without_a_dot_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_model(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    assert find_model("models/mine").location == str((tmp_path / "models" / "mine").resolve())


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/no/such/folder", "builtin:nothing", "a/b/c"])
def test_a_missing_folder_is_no_hub_id(name: str):
    with pytest.raises(ModelError, match="no model folder"):
        find_model(name)


@pytest.mark.parametrize("name", ["builtin:tiny", "builtin:", "builtin:nothing", "builtin:../../etc"])
def test_a_builtin_name_that_is_no_model_leads_to_those_that_are(name: str):
    with pytest.raises(ModelError) as caught:
        find_model(name)
    assert caught.value.found == f"There is no model folder {name}; dsft brings along builtin:tiny/model."


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("model-q8_0.GGUF", "{} is a GGUF file, which llama.cpp and Ollama read, but dsft does not."),
        ("model.safetensors", "{} is a file, and a model is a folder."),
    ],
)
def test_a_file_is_named_as_such(tmp_path: Path, file: str, found: str):
    (tmp_path / file).touch()
    with pytest.raises(ModelError) as caught:
        find_model(str(tmp_path / file))
    assert caught.value.found == found.format(tmp_path / file)


def test_a_builtin_name_cannot_leave_the_presets():
    with pytest.raises(ModelError):
        find_model("builtin:../../etc")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_without_a_usable_config_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        find_model(str(tmp_path))


def test_an_adapter_is_named_as_such(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        find_model(str(tmp_path))


def test_an_unreachable_hub_names_the_ways_on():
    with pytest.raises(UnreachableHubError, match=r"--model-name DIR.*--preset tiny"):
        find_model("deepseek-ai/deepseek-coder-6.7b-base")


def source(**config) -> ModelSource:
    return ModelSource("m", "/m", None, None, {"model_type": "llama", **config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma2"}, "family gemma2"),
        ({"model_type": ["llama"]}, r"model_type must be text, and is \['llama'\]"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, and is 'linear'"),
        ({"quantization_config": {}}, "quantized already"),
        ({"max_position_embeddings": 512}, "512 positions"),
        ({"model_type": "mistral", "sliding_window": 512}, "window of 512"),
    ],
)
def test_models_that_cannot_be_trained_exactly_are_refused(config: dict, message: str):
    with pytest.raises(ModelError, match=message):
        check_trainable(source(**config), max_length=1024)


def test_the_model_dsft_is_for_is_accepted(shared: Path):
    config = json.loads((shared / "assets" / "deepseek-coder-6.7b" / "config.json").read_text())
    check_trainable(ModelSource("m", "/m", None, None, config), max_length=16384)
    check_trainable(source(model_type="qwen2", sliding_window=512, use_sliding_window=False), max_length=1024)


def test_weights_are_known_again_by_their_content(tmp_path: Path):
    first = write_model(tmp_path / "a", hidden_size=64)
    second = write_model(tmp_path / "b", hidden_size=64)
    content = bytes(range(256)) * 4000
    for folder in (first, second):
        (folder / "model.safetensors").write_bytes(content)
    fingerprint = fingerprint_weights(find_model(str(first)))
    assert fingerprint_weights(find_model(str(second))) == fingerprint
    (second / "model.safetensors").write_bytes(bytes(byte ^ 1 for byte in content))
    assert fingerprint_weights(find_model(str(second))) != fingerprint
    (second / "model.safetensors").write_bytes(content)
    write_model(second, hidden_size=65)
    assert fingerprint_weights(find_model(str(second))) != fingerprint


def test_the_commit_is_the_fingerprint_of_a_hub_model():
    assert fingerprint_weights(ModelSource("a/b", "a/b", None, "0123abc", {})) == "0123abc"


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="model_revision"):
        find_model(str(write_model(tmp_path / "m")), "main")
