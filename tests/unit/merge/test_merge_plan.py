"""What `dsft merge` refuses, by name and before anything is written: adapters and bases that give no exact model."""

import collections
import dataclasses
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftType
from safetensors.torch import load_file
from transformers import Lfm2Config, Lfm2ForCausalLM

import dsft.merge.adapter
from dsft.cli.app import main
from dsft.core.errors import MergeError
from dsft.merge.adapter import open_adapter
from tests.merge_models import write_base, write_lora
from tests.scripted_models import make_tokenizer
from tests.unit.merge.refusals import Change, change_json, change_weights, look, merge, put, refused

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
ATTENTION = ["q_proj", "v_proj"]


def test_the_adapter_that_the_tests_spoil_can_be_merged(adapter: Path) -> None:
    assert merge(adapter).num_updated_tensors == 14


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("arrow_config", {"top_k": 2}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("velora_config", {"scale": 1.0}),
        ("monteclora_config", {"num_samples": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_settings_that_no_fixed_weight_computes_are_refused_by_name(adapter: Path, name: str, value: Any) -> None:
    change_json(adapter / "adapter_config.json", **{name: value})
    refused(adapter, f"adapter_config.json has {name}: ")


@pytest.mark.parametrize("value", [None, False])
def test_an_unknown_setting_that_is_off_changes_nothing(adapter: Path, value: object) -> None:
    change_json(adapter / "adapter_config.json", a_setting_of_tomorrow=value)
    merge(adapter)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_as_it_is_are_merged(adapter: Path, start: object) -> None:
    more = {"eva_config": {"rho": 2.0}} if start == "eva" else {}
    change_json(adapter / "adapter_config.json", init_lora_weights=start, **more)
    merge(adapter)


def test_every_setting_of_peft_has_been_decided_on() -> None:
    """A setting that a newer PEFT brings would be taken for one that changes no weight."""
    without_effect = """auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type
        lora_dropout runtime_config megatron_core qalora_group_size eva_config corda_config loftq_config
        lora_ga_config"""
    merged = """alpha_pattern bias ensure_weight_tying exclude_modules fan_in_fan_out layers_pattern layers_to_transform
        lora_alpha lora_bias modules_to_save r rank_pattern target_modules trainable_token_indices use_dora
        use_rslora"""
    refused = """init_lora_weights layer_replication alora_invocation_tokens target_parameters arrow_config use_qalora
        use_bdlora velora_config monteclora_config kasa_config megatron_config"""
    decided = {*without_effect.split(), *merged.split(), *refused.split()}
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= decided


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PeftType if kind != PeftType.LORA))
def test_adapters_of_other_kinds_are_refused(adapter: Path, kind: str) -> None:
    change_json(adapter / "adapter_config.json", peft_type=kind)
    refused(adapter, f"{kind} adapter")


def test_a_low_rank_update_of_a_convolution_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(vocab_size=len(tokenizer), num_hidden_layers=1, layer_types=["conv"], **shape)
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_lora(tmp_path / "adapter", tmp_path / "base", {"target_modules": ["conv.conv"], "r": 32})
    refused(tmp_path / "adapter", r"changes model\.layers\.0\.conv\.conv, a Conv1d")


@pytest.mark.parametrize(
    ("settings", "is_tied", "num_new_tokens", "words"),
    [
        pytest.param(
            {"target_modules": ATTENTION, "lora_bias": True},
            False,
            0,
            r"adds a bias to model\.layers\.0\.self_attn\.q_proj, which has none",
            id="bias-without-place",
        ),
        pytest.param(
            {"target_modules": [*ATTENTION, "lm_head"], "trainable_token_indices": [3, 5]},
            True,
            0,
            "does not fit the base model: trainable_token_indices",
            id="tied-tokens-and-lora-head",
        ),
        # PEFT saves of a resized model with an update of one end only that end.
        pytest.param(
            {"target_modules": [*ATTENTION, "embed_tokens"]},
            False,
            3,
            r"lm_head\.weight of .* has the shape \[259, 64\], and \[267, 64\] is needed",
            id="resized-head-not-saved",
        ),
        pytest.param(
            {"target_modules": [*ATTENTION, "lm_head"]},
            False,
            3,
            r"lm_head.* has the shape \[267, 64\], and \[259, 64\] is needed",
            id="resized-embedding-not-saved",
        ),
    ],
)
def test_adapters_that_no_model_of_this_shape_computes_are_refused(
    tmp_path: Path, settings: dict[str, Any], is_tied: bool, num_new_tokens: int, words: str
) -> None:
    base = write_base(tmp_path / "base", is_tied=is_tied)
    write_lora(tmp_path / "adapter", base, settings, num_new_tokens=num_new_tokens)
    refused(tmp_path / "adapter", words)


def remove(name: str) -> Change:
    return lambda weights: weights.pop(name)


def add(name: str, *shape: int) -> Change:
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove(f"{FIRST}.lora_A.weight"), r"is incomplete for .*: lora_A of model\.layers\.0\.self_attn\.q_proj"),
        (remove(f"{FIRST}.lora_B.weight"), r"is incomplete for .*: lora_B of model\.layers\.0\.self_attn\.q_proj"),
        (add(f"{FIRST}.lora_magnitude_vector", 64), r"no place for .*q_proj\.lora_magnitude_vector"),
        (add(f"{FIRST}.lora_B.bias", 64), r"no place for .*q_proj\.lora_B\.bias"),
        (add("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", 4, 64), r"no place for .*layers\.7\."),
        (add("base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight", 64, 4), r"no place for .*layers\.7\."),
        (add("base_model.model.model.layers.0.extra.weight", 4), r"no place for .*layers\.0\.extra\.weight"),
        (add("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 1, 64), "no place for"),
        (add("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 64), "no name that PEFT gives"),
        (add(f"{FIRST}.lora_A.weight", 5, 64), r"lora_A\.weight of .* has the shape \[5, 64\].* needs \[4, 64\]"),
        (add(f"{FIRST}.lora_B.weight", 4, 64), r"lora_B\.weight of .* has the shape \[4, 64\].* needs \[64, 4\]"),
        (add("base_model.model.lm_head.weight", 10, 64), r"lm_head\.weight of the adapter .* has the shape \[10, 64\]"),
    ],
)
def test_tensors_that_are_missing_surplus_or_of_another_shape_are_refused(
    adapter: Path, change: Change, words: str
) -> None:
    change_weights(adapter / "adapter_model.safetensors", change)
    refused(adapter, words)


MLP = "base_model.model.model.layers.1.mlp"
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("family", "settings", "missing", "words"),
    [
        ("llama", {"use_dora": True}, [f"{FIRST}.lora_magnitude_vector"], "lora_magnitude_vector of model"),
        ("qwen2", {"lora_bias": True}, [f"{FIRST}.lora_B.bias"], "lora_B's bias of model"),
        ("qwen2", {"bias": "all"}, ["base_model.model.model.layers.1.self_attn.k_proj.bias"], r"k_proj\.bias"),
        ("qwen2", {"bias": "lora_only"}, [f"{FIRST}.base_layer.bias"], r"layers\.0\.self_attn\.q_proj\.bias"),
        ("llama", {"modules_to_save": ["mlp"]}, [f"{MLP}.down_proj.weight"], r"layers\.1\.mlp\.down_proj\.weight"),
        (
            "llama",
            {"modules_to_save": ["mlp"]},
            [f"{MLP}.{name}_proj.weight" for name in ("up", "gate", "down")],
            r"layers\.1\.mlp",
        ),
        ("llama", {"trainable_token_indices": [3, 5]}, [DELTA], r"the rows of model\.embed_tokens"),
    ],
    ids=["magnitudes", "lora-bias", "bias", "bias-of-site", "part-of-module", "module", "token-rows"],
)
def test_whatever_else_was_trained_may_not_be_missing(
    tmp_path: Path, family: Any, settings: dict[str, Any], missing: list[str], words: str
) -> None:
    base = write_base(tmp_path / "base", family)
    write_lora(tmp_path / "adapter", base, {"target_modules": ATTENTION, **settings})
    for name in missing:
        change_weights(tmp_path / "adapter" / "adapter_model.safetensors", remove(name))
    refused(tmp_path / "adapter", f"is incomplete for .*: .*{words}.* was trained and is missing")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_an_adapter_with_numbers_that_are_not_finite_is_refused(adapter: Path, number: float) -> None:
    change_weights(adapter / "adapter_model.safetensors", put(f"{FIRST}.lora_B.weight", number))
    refused(adapter, r"holds NaN or infinite numbers in .*layers\.0\.self_attn\.q_proj\.lora_B", MergeError)


@pytest.mark.parametrize(
    ("spoil", "dtype", "number"),
    [("adapter", "float16", 1e7), ("base", "float16", 1e5), ("base", "bfloat16", float("nan"))],
)
def test_a_result_that_is_not_finite_leaves_nothing(
    adapter: Path, spoil: str, dtype: str, number: float, capsys: pytest.CaptureFixture[str]
) -> None:
    file, name = {
        "adapter": (adapter / "adapter_model.safetensors", f"{FIRST}.lora_B.weight"),
        "base": (adapter.parent / "base" / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"),
    }[spoil]
    change_weights(file, put(name, number))
    before = look(adapter.parent).keys()
    assert main(["merge", str(adapter), "--dtype", dtype, "--quiet"]) == 1
    assert "model.layers.0.self_attn.q_proj.weight of the merged model would hold" in capsys.readouterr().err
    assert look(adapter.parent).keys() == before


def test_what_overflows_float16_fits_into_bfloat16(adapter: Path) -> None:
    change_weights(adapter / "adapter_model.safetensors", put(f"{FIRST}.lora_B.weight", 1e7))
    merge(adapter, dtype="bfloat16")


def test_a_pickle_that_would_run_code_is_refused_and_not_run(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": Bomb(adapter / "it-ran")}, adapter / "adapter_model.bin")
    refused(adapter, r"adapter_model\.bin can't be read as plain tensors")


def write_pickle(adapter: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights: dict[str, Any] = dict(load_file(adapter / "adapter_model.safetensors"))
    (adapter / "adapter_model.safetensors").unlink()
    change(weights)
    torch.save(weights, adapter / "adapter_model.bin")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 162\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (LFS_POINTER, "is a pointer of Git LFS"),
        (b"no pickle at all", "can't be read as plain tensors"),
        (pickle.dumps(collections.OrderedDict(a=Fraction(1, 3))), "can't be read as plain tensors"),
        (pickle.dumps([1, 2]), "can't be read as plain tensors"),
        (b"PK\x03\x04" + bytes(100), "can't be read as plain tensors"),
    ],
    ids=["empty", "lfs-pointer", "text", "foreign-pickle", "plain-pickle", "broken-zip"],
)
def test_a_broken_pickle_is_refused_without_advice_to_run_it(adapter: Path, content: bytes, words: str) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(content)
    told = refused(adapter, rf"adapter_model\.bin {words}")
    assert "weights_only" not in f"{told.found} {told.fix}" and "torch" not in f"{told.found} {told.fix}"


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (LFS_POINTER, "is a pointer of Git LFS")])
def test_safetensors_that_are_not_there_are_refused_by_name(adapter: Path, content: bytes, words: str) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused(adapter, rf"adapter_model\.safetensors {words}")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(64, 4).to_sparse(), "which is sparse"),
        (torch.zeros(64, 4, device="meta"), "which is on the meta device"),
        (torch.zeros(64, 4, dtype=torch.int32), "as numbers of the type int32"),
        (torch.zeros(64, 4, dtype=torch.complex64), "as numbers of the type complex64"),
        (torch.zeros(64, 4).to(torch.float8_e4m3fn), "as numbers of the type float8_e4m3fn"),
        ([0.0, 1.0], "something else than tensors"),
    ],
    ids=["sparse", "meta", "int", "complex", "fp8", "list"],
)
def test_tensors_of_a_pickle_that_are_no_plain_numbers_are_refused(adapter: Path, value: Any, words: str) -> None:
    name = f"{FIRST}.lora_B.weight"
    write_pickle(adapter, lambda weights: weights.update({name: value}))
    refused(adapter, rf"adapter_model\.bin holds .*{words}")


@pytest.mark.parametrize(("dtype", "words"), [(torch.int32, "int32"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_numbers_of_safetensors_that_are_no_floats_are_refused(adapter: Path, dtype: torch.dtype, words: str) -> None:
    name = f"{FIRST}.lora_B.weight"
    change_weights(
        adapter / "adapter_model.safetensors", lambda weights: weights.update({name: weights[name].to(dtype)})
    )
    refused(adapter, f"numbers of the type {words}")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_rows_of_an_adapter_are_those_of_the_whole_in_memory_of_their_own(
    adapter: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_file(adapter / "adapter_model.safetensors")
    if kind == "bin":
        write_pickle(adapter, lambda weights: None)
        monkeypatch.setattr(dsft.merge.adapter, "_REOPENED_AFTER_BYTES", 100)
    weights = open_adapter(adapter).weights
    with closing(weights), ThreadPoolExecutor(8) as pool:
        for name, tensor in expected.items():
            firsts, lasts = range(len(tensor)), range(1, len(tensor) + 1)
            rows = list(pool.map(weights.read_rows, repeat(name), firsts, lasts))
            assert torch.equal(torch.cat(rows), tensor)
            assert all(each.untyped_storage().nbytes() == each.nbytes for each in rows)
            assert torch.equal(weights.read(name), tensor)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))
