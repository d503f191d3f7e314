"""Every kind of adapter that PEFT makes, merged: logits as of base and adapter, weights as of a float64 reference.

PEFT's own merge is met too, where it is right.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsft.merge.config import MergeConfig
from dsft.merge.prompts import MOST_TOKENS
from dsft.merge.result import MergeResult
from dsft.merge.run import run_merge
from tests.merge_kinds import KINDS, PLAIN, Kind
from tests.merge_models import (
    compute_reference,
    make_ids,
    round_exactly,
    run_logits,
    write_base,
    write_lora,
)

LOGIT_NOISE = 2e-5
"""Share of the logits' spread that the order of float32 sums decides in a model of two layers."""

FLOAT32_STEP = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Merged:
    """An adapter merged in float32, and what it is held against."""

    kind: Kind
    adapter: Path
    result: MergeResult
    weights: dict[str, Tensor]
    logits: Tensor
    unmerged_logits: Tensor
    reference: dict[str, Tensor]
    peft_weights: dict[str, Tensor]
    peft_logits: Tensor

    def find_difference(self, logits: Tensor) -> float:
        """Return the greatest difference from base and adapter, as a share of the logits' spread."""
        return float((logits - self.unmerged_logits).abs().max() / self.unmerged_logits.std())


@pytest.fixture(scope="module", params=KINDS, ids=str)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    kind, folder = request.param, tmp_path_factory.mktemp("kind")
    base = write_base(folder / "base", kind.family, is_tied=kind.is_tied)
    adapted = write_lora(folder / "adapter", base, kind.settings, num_new_tokens=kind.num_new_tokens)
    ids = make_ids(adapted)
    unmerged_logits, reference = run_logits(adapted, ids), compute_reference(adapted)
    result = merge(folder / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights
        by_peft = adapted.merge_and_unload()
    return Merged(
        kind=kind,
        adapter=folder / "adapter",
        result=result,
        weights=read_weights(folder / "adapter" / "merged_model"),
        logits=run_logits(load(folder / "adapter" / "merged_model"), ids),
        unmerged_logits=unmerged_logits,
        reference=reference,
        peft_weights=by_peft.state_dict(),
        peft_logits=run_logits(by_peft, ids),
    )


def merge(adapter: Path, output: Path | None = None, **settings: object) -> MergeResult:
    config = MergeConfig(str(adapter), output, **({"dtype": "float32"} | settings))  # type: ignore[arg-type]
    return run_merge(config, lambda event: None)


def load(folder: Path) -> torch.nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def test_the_merged_model_loads_and_computes_what_base_and_adapter_do(merged: Merged) -> None:
    assert merged.find_difference(merged.logits) < LOGIT_NOISE


def test_the_weights_are_those_of_the_float64_reference(merged: Merged) -> None:
    # A head that stays tied is the embedding: it is in no file, and its reference must be the embedding's.
    tied = {"lm_head.weight"} if merged.kind.stays_tied else set()
    assert merged.weights.keys() == merged.reference.keys() - tied
    for name in tied:
        embedding = next(key for key in merged.reference if key.endswith(("embed_tokens.weight", "wte.weight")))
        torch.testing.assert_close(merged.reference[name], merged.reference[embedding], rtol=1e-14, atol=1e-15)
    for name, weight in merged.weights.items():
        expected = merged.reference[name]
        assert weight.dtype == torch.float32
        assert (weight.double() - expected).abs().max() <= 4 * FLOAT32_STEP * expected.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_weights_of_16_bits_are_the_reference_correctly_rounded(
    merged: Merged, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A float32 sum beside a tie may fall to its other side: one step, in at most a thousandth of the weights."""
    merge(merged.adapter, tmp_path / "out", dtype=str(dtype).removeprefix("torch."), is_verifying=False)
    num_other = num_weights = 0
    for name, weight in read_weights(tmp_path / "out").items():
        assert weight.dtype == dtype
        exact = merged.reference[name]
        expected, steps = round_exactly(exact, dtype)
        differs = weight.double() != expected
        assert ((weight.double() - expected).abs() <= steps).all(), name
        ties = (weight.double() + expected) / 2
        noise = 4 * FLOAT32_STEP * exact.abs().max()
        assert ((exact - ties).abs()[differs] <= noise).all(), name
        num_other += int(differs.sum())
        num_weights += weight.numel()
    assert num_other <= num_weights / 1000


def test_peft_s_merge_is_met_where_it_is_right(merged: Merged) -> None:
    """Where a tensor is shared by embedding and head, PEFT adds an update of one of them to both."""
    if merged.kind.is_peft_wrong:
        assert merged.find_difference(merged.peft_logits) > 0.1
        return
    assert merged.find_difference(merged.peft_logits) < LOGIT_NOISE
    for name, weight in merged.weights.items():
        if merged.kind.settings.get("use_dora"):
            torch.testing.assert_close(weight, merged.peft_weights[name], rtol=4 * FLOAT32_STEP, atol=1e-8)
        else:
            assert torch.equal(weight, merged.peft_weights[name]), name


def test_verification_finds_no_difference_but_float32_noise(merged: Merged) -> None:
    found, spread = merged.result.verification, float(merged.unmerged_logits.std())
    assert found is not None
    assert found.excess_mean_difference <= 1e-6 * spread
    assert found.mean_difference <= 2e-6 * spread
    assert found.max_difference <= LOGIT_NOISE * spread
    assert found.max_kl < 1e-10
    assert found.num_tokens == 5 * MOST_TOKENS


def test_the_configuration_says_what_the_weights_are(merged: Merged) -> None:
    config = json.loads((merged.adapter / "merged_model" / "config.json").read_text())
    assert config.get("tie_word_embeddings", True) == merged.kind.stays_tied
    assert config["vocab_size"] == merged.unmerged_logits.shape[-1]
    assert config["torch_dtype"] == "float32"


def split_by_size(base: Path) -> None:
    """Write a base anew as transformers does with small shards."""
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="60KB")
    assert len(list(base.glob("*.safetensors"))) > 3


def split_unevenly(base: Path) -> None:
    """Divide a base into files of 74 and 26 percent, as DeepSeek-Coder's are, with tensors in no order."""
    weights = load_file(base / "model.safetensors")
    names = sorted(weights, key=lambda name: name[::-1])
    total, first = sum(weight.nbytes for weight in weights.values()), 0
    places = {}
    for name in names:
        places[name] = f"model-0000{1 if first < 0.74 * total else 2}-of-00002.safetensors"
        first += weights[name].nbytes
    for file in sorted(set(places.values())):
        save_file({name: weights[name] for name in names if places[name] == file}, base / file, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").unlink()


def save_without_head(base: Path) -> None:
    """Write a base as its inner model is saved, whose tensors have shorter names."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.base_model.save_pretrained(base)
    assert not any(name.startswith(model.base_model_prefix) for name in load_file(base / "model.safetensors"))


def add_masks(base: Path) -> None:
    """Add the attention masks that old GPT-2 checkpoints hold."""
    weights = load_file(base / "model.safetensors")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for layer in (0, 1)}
    save_file(weights | masks, base / "model.safetensors", {"format": "pt"})


def leave_as_it_is(base: Path) -> None:
    """One file, as transformers writes small models."""


TIED = Kind("tied", PLAIN.settings, is_tied=True)
GPT2 = next(kind for kind in KINDS if kind.name == "conv1d")


@pytest.mark.parametrize(
    ("kind", "dtype", "change"),
    [
        pytest.param(PLAIN, torch.bfloat16, split_by_size, id="shards"),
        pytest.param(PLAIN, torch.bfloat16, split_unevenly, id="74-26"),
        pytest.param(PLAIN, torch.float16, split_unevenly, id="float16"),
        pytest.param(PLAIN, torch.float32, leave_as_it_is, id="float32"),
        pytest.param(TIED, torch.bfloat16, save_without_head, id="without-head"),
        pytest.param(GPT2, torch.float32, save_without_head, id="without-head-gpt2"),
        pytest.param(GPT2, torch.bfloat16, add_masks, id="masks-gpt2"),
    ],
)
def test_how_a_base_is_stored_changes_nothing(
    kind: Kind, dtype: torch.dtype, change: Callable[[Path], None], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", kind.family, is_tied=kind.is_tied, dtype=dtype)
    adapted = write_lora(tmp_path / "adapter", base, kind.settings)
    change(base)
    merge(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    if kind.is_tied:
        del expected["lm_head.weight"]
    found = read_weights(tmp_path / "adapter" / "merged_model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    load(tmp_path / "adapter" / "merged_model")


@pytest.mark.parametrize("is_new_format", [True, False], ids=["zip", "before-1.6"])
def test_a_pickled_adapter_gives_the_same_model(is_new_format: bool, tmp_path: Path) -> None:
    write_lora(tmp_path / "adapter", write_base(tmp_path / "base"), PLAIN.settings)
    merge(tmp_path / "adapter", tmp_path / "safe")
    safe = tmp_path / "adapter" / "adapter_model.safetensors"
    pickled = tmp_path / "adapter" / "adapter_model.bin"
    torch.save(load_file(safe), pickled, _use_new_zipfile_serialization=is_new_format)
    safe.unlink()
    merge(tmp_path / "adapter", tmp_path / "pickled")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("safe", "pickled")]
    assert written[0] == written[1]
