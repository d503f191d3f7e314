"""`dsft merge` on a real pretrained model: its logits against those that transformers and PEFT compute unmerged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft.core.models.attention import choose_attention
from dsft.core.models.device import resolve_device
from dsft.core.models.load import load_quantized
from dsft.core.models.source import find_model
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

DATASET = "codealpaca-6k.jsonl"
NUM_TEXTS, NUM_TOKENS = 4, 64
TRAINING = (
    *("--max-samples", "64", "--max-length", "256", "--validation-split", "0", "--device", "cpu"),
    *("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1", "--no-gradient-checkpointing"),
    *("--max-steps", "5", "--learning-rate", "1e-3", "--warmup-ratio", "0", "--lora-r", "8"),
)

FLOAT32_NOISE = 1e-4
"""The order of float32 sums in 30 layers changes a logit by less, relative to the logits' spread; 1.2e-5 was seen."""


@pytest.fixture(scope="module")
def base(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "smollm2"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = ["bash", str(shared / "fetch_smollm2.sh"), str(folder)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"SmolLM2 can't be had here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    paths = ("--model-name", base, "--dataset", shared / "data" / DATASET, "--save-dir", folder / "trained")
    run_in(folder, "train", *paths, "--output-dir", folder / "results", *TRAINING)
    return folder / "trained"


@pytest.fixture(scope="module")
def token_ids(base: Path, shared: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(base)
    with (shared / "data" / DATASET).open(encoding="utf-8") as file:
        texts = [" ".join(json.loads(line).values()) for line in file]
    rows = [ids for text in texts if len(ids := tokenizer(text)["input_ids"]) >= NUM_TOKENS]
    return torch.tensor([row[:NUM_TOKENS] for row in rows[-NUM_TEXTS:]])


def run_in(folder: Path, *arguments: str | Path) -> str:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "dsft", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_nf4(folder: Path) -> nn.Module:
    device = resolve_device("cpu")
    return load_quantized(find_model(str(folder)), device, "fp32", choose_attention(None, device, "fp32"))


def load_rounded(folder: Path) -> nn.Module:
    """The base whose linear layers hold what those of the quantized one dequantize to."""
    model = load(folder)
    for name, module in load_nf4(folder).named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_submodule(name).weight.data.copy_(weight)
    return model


def compute_logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Logits of each text alone."""
    model.eval()
    bounds = torch.tensor([0, NUM_TOKENS], dtype=torch.int32)  # what dsft's attention in the quantized model asks for
    with torch.inference_mode():
        return torch.cat([model(row.unsqueeze(0), use_cache=False, cu_seq_lens_q=bounds).logits for row in token_ids])


def round_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(dtype))
    return model


@pytest.mark.parametrize("rounding", ["none", "nf4"])
def test_the_merged_model_computes_what_base_and_adapter_do(
    rounding: str, base: Path, adapter: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    unmerged = PeftModel.from_pretrained((load if rounding == "none" else load_nf4)(base), adapter)
    with unmerged.disable_adapter():
        untrained = compute_logits(unmerged, token_ids)
    reference = compute_logits(unmerged, token_ids)
    by_peft = PeftModel.from_pretrained((load if rounding == "none" else load_rounded)(base), adapter)
    control = compute_logits(round_weights(by_peft.merge_and_unload(), torch.bfloat16), token_ids)
    merged = {}
    for dtype in ("float32", "bfloat16"):
        flags = ("--base-rounding", rounding, "--dtype", dtype, "--output", tmp_path / dtype, "--json")
        result = json.loads(run_in(tmp_path, "merge", adapter, *flags).splitlines()[-1])
        assert result["verification"]["num_tokens"] > 0
        merged[dtype] = compute_logits(load(tmp_path / dtype), token_ids)

    spread = reference.std()
    explained = (control - reference).abs().mean()
    assert (reference - untrained).abs().mean() > 3 * explained  # what is compared is the update, and no noise
    assert (merged["float32"] - reference).abs().max() < FLOAT32_NOISE * spread
    assert (merged["bfloat16"] - control).abs().mean() < 0.1 * explained
    assert explained < 40 * torch.finfo(torch.bfloat16).eps / 2 * spread
