"""The base of a merge: another model, tokenizer or weights are refused by name, before anything is written."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsft.merge.base
from dsft.core.errors import DsftError, MergeError, ModelError, OutputFolderError
from dsft.core.models.source import find_model, fingerprint_weights
from tests.merge_kinds import PLAIN
from tests.merge_models import write_base, write_lora
from tests.unit.merge.refusals import change_json, change_weights, merge, put, record_run, refused

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(adapter: Path) -> Path:
    return adapter.parent / "base"


@pytest.mark.parametrize("settings", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"intermediate_size": 64}])
def test_a_base_of_another_shape_is_refused_even_with_force(adapter: Path, settings: dict[str, Any]) -> None:
    write_base(adapter.parent / "other", **settings)
    words = r"belongs to another model|is incomplete|has the shape|does not fit"
    refused(adapter, words, base=str(adapter.parent / "other"), force=True)


def test_a_base_without_a_tensor_is_refused_by_its_name(adapter: Path, base: Path) -> None:
    change_weights(base / "model.safetensors", lambda weights: weights.pop(WEIGHT))
    refused(adapter, f"has no tensor {WEIGHT}")


def test_a_base_saved_without_its_head_has_no_head(adapter: Path, base: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(base)
    refused(adapter, r"has no tensor lm_head\.weight")


def test_a_quantized_base_is_refused(adapter: Path, base: Path) -> None:
    change_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(adapter, "is quantized")


@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "uint8"), (torch.int8, "I8")]
)
def test_quantized_weights_without_a_word_of_it_are_refused(
    adapter: Path, base: Path, dtype: torch.dtype, words: str
) -> None:
    change_weights(base / "model.safetensors", lambda weights: weights.update({WEIGHT: weights[WEIGHT].to(dtype)}))
    refused(adapter, f"holds numbers of the type {words}, so .* quantized")


def test_a_quantized_tensor_that_the_model_does_not_use_does_no_harm(adapter: Path, base: Path) -> None:
    mask = torch.ones(4, dtype=torch.uint8)
    change_weights(base / "model.safetensors", lambda weights: weights.update({"model.layers.0.attn.bias": mask}))
    merge(adapter)


class Hub:
    """A hub that holds one model and records what is asked of it; what is not asked for does not come."""

    def __init__(self, stored: Path, cache: Path) -> None:
        self.stored, self.folder = stored, cache / "snapshots" / "0123abc"
        self.asked: list[list[str]] = []
        self.folder.mkdir(parents=True)

    def hf_hub_download(self, name: str, file: str, **_: Any) -> str:
        shutil.copy(self.stored / file, self.folder / file)
        return str(self.folder / file)

    def snapshot_download(self, name: str, *, revision: str, allow_patterns: list[str], **_: Any) -> str:
        assert (name, revision) == ("some-org/base", "0123abc")
        self.asked.append(allow_patterns)
        for path in self.stored.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.folder / path.name)
        return str(self.folder)


@pytest.fixture
def hub(adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The adapter's base on a hub, beside another copy of the weights."""
    hub = Hub(base, tmp_path / "cache")
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="some-org/base")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def found_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def load_small_tokenizer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the base's tokenizer be read from where the hub put it."""
    right = dsft.merge.base.load_tokenizer
    monkeypatch.setattr(
        dsft.merge.base,
        "load_tokenizer",
        lambda source: right(source if source.is_local else dataclasses.replace(source, location=str(hub.folder))),
    )


def test_of_a_hub_s_weights_only_the_file_that_is_read_is_fetched_and_last(
    adapter: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_small_tokenizer(hub, monkeypatch)
    assert merge(adapter).base_revision == "0123abc"
    assert found_files(hub.folder) == {"model.safetensors"}
    small, weights = hub.asked
    assert weights == ["model.safetensors"]
    assert not any(fnmatch("model.safetensors", pattern) for pattern in small)


def test_of_a_hub_s_shards_those_are_fetched_that_the_index_names(
    adapter: Path, base: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_small_tokenizer(hub, monkeypatch)
    weights = load_file(base / "model.safetensors")
    places = {name: f"part-{position % 2}.safetensors" for position, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    merge(adapter)
    assert hub.asked[-1] == ["part-0.safetensors", "part-1.safetensors"]
    assert found_files(hub.folder) == {"part-0.safetensors", "part-1.safetensors"}


def spoil_output(adapter: Path) -> None:
    (adapter / "merged_model").mkdir()
    (adapter / "merged_model" / "notes.txt").touch()


@pytest.mark.parametrize(
    ("spoil", "words", "kind", "num_asked"),
    [
        (spoil_output, "holds files that `dsft merge` did not write", OutputFolderError, 0),
        (lambda adapter: change_json(adapter / "adapter_config.json", use_qalora=True), "use_qalora", ModelError, 0),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b""), "is empty", ModelError, 0),
        (
            lambda adapter: change_weights(
                adapter / "adapter_model.safetensors",
                put("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", float("nan")),
            ),
            "holds NaN",
            MergeError,
            0,
        ),
        (
            lambda adapter: change_weights(adapter / "adapter_model.safetensors", lambda weights: weights.popitem()),
            "is incomplete",
            ModelError,
            1,
        ),
    ],
    ids=["output", "setting", "empty", "nan", "incomplete"],
)
def test_what_the_hub_s_weights_are_not_needed_for_is_refused_before_they_are_fetched(
    adapter: Path,
    hub: Hub,
    spoil: Callable[[Path], object],
    words: str,
    kind: type[DsftError],
    num_asked: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_small_tokenizer(hub, monkeypatch)
    spoil(adapter)
    refused(adapter, words, kind)
    assert len(hub.asked) == num_asked
    assert not found_files(hub.folder)


def test_a_base_of_another_name_takes_force(adapter: Path, base: Path) -> None:
    shutil.copytree(base, adapter.parent / "other")
    refused(adapter, r"was trained on .*base, and --base is .*other", base=str(adapter.parent / "other"))
    assert merge(adapter, base=str(adapter.parent / "other"), force=True).base == str(adapter.parent / "other")


def test_a_copy_under_the_same_last_name_is_the_same_base(adapter: Path, base: Path) -> None:
    record_run(adapter, "some-org/BASE")
    copy = adapter.parent / "elsewhere" / "base"
    shutil.copytree(base, copy)
    assert merge(adapter, base=f"{copy}/").base == f"{copy}/"


def test_other_weights_under_the_same_name_take_force(adapter: Path, base: Path) -> None:
    record_run(adapter, str(base), fingerprint=fingerprint_weights(find_model(str(base))))
    merge(adapter)
    change_weights(base / "model.safetensors", put(WEIGHT, 0.125))
    refused(adapter, "The weights of .*base are not those that .*adapter was trained on", overwrite=True)
    merge(adapter, overwrite=True, force=True)


def test_the_same_weights_under_another_name_need_no_force(adapter: Path, base: Path) -> None:
    record_run(adapter, str(base), fingerprint=fingerprint_weights(find_model(str(base))))
    shutil.copytree(base, adapter.parent / "other")
    merge(adapter, base=str(adapter.parent / "other"))


def test_a_tokenizer_with_a_token_of_another_id_is_refused(adapter: Path) -> None:
    path = adapter / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    refused(adapter, r"tokenizer is not that of .*base: '(a|b)' has the id \d+ there and \d+ here")


def test_a_tokenizer_larger_than_the_model_is_refused(adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(adapter)
    refused(adapter, "The tokenizer has a token 259, and the merged model only 259 tokens")


def test_without_a_tokenizer_of_its_own_the_adapter_takes_the_base_s(adapter: Path, base: Path) -> None:
    (adapter / "tokenizer.json").unlink()
    merge(adapter)
    merged = adapter / "merged_model" / "tokenizer.json"
    assert merged.read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_tied_head_in_the_checkpoint_counts_no_more_than_for_transformers(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", is_tied=True)
    weights = load_file(base / "model.safetensors")
    adapted = write_lora(tmp_path / "adapter", base, PLAIN.settings)
    other = weights["model.embed_tokens.weight"] + 1
    save_file(weights | {"lm_head.weight": other}, base / "model.safetensors", {"format": "pt"})
    merge(tmp_path / "adapter", dtype="float32")
    found = load_file(tmp_path / "adapter" / "merged_model" / "model.safetensors")
    assert "lm_head.weight" not in found
    expected = adapted.merge_and_unload().state_dict()
    assert all((found[name] == expected[name]).all() for name in found)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({WEIGHT: "../model.safetensors"}, r"names the file \.\./model\.safetensors, which is outside its folder"),
        ({WEIGHT: "model-2.safetensors"}, r"names the file model-2\.safetensors, which is missing"),
        ({"model.extra": "model.safetensors"}, r"names model\.extra, which is in none of its files"),
    ],
)
def test_an_index_that_leads_astray_is_refused(adapter: Path, base: Path, places: dict[str, str], words: str) -> None:
    index = dict.fromkeys(load_file(base / "model.safetensors"), "model.safetensors") | places
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(adapter, words)


@pytest.mark.parametrize("whose", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_truncated_file_is_refused(adapter: Path, whose: str) -> None:
    path = adapter.parent / whose
    path.write_bytes(path.read_bytes()[:-100])
    refused(adapter, f"{path.name} is damaged")
