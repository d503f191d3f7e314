"""The seed document's own Python snippets, run to the letter against folders as dsft writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.infer.config import InferConfig
from dsft.infer.run import run_infer
from dsft.merge.config import MergeConfig
from dsft.merge.run import run_merge
from tests.conftest import REPOSITORY
from tests.scripted_models import write_adapter

TINY_MODEL = REPOSITORY / "presets" / "tiny" / "model"

ADAPTER_SNIPPET = r"""from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel

base_model = AutoModelForCausalLM.from_pretrained(
    "deepseek-ai/deepseek-coder-6.7b-base",
    torch_dtype=torch.float16,
    device_map="auto"
)

model = PeftModel.from_pretrained(base_model, "./trained_deepseek")
tokenizer = AutoTokenizer.from_pretrained("./trained_deepseek")

prompt = "### Instruction:\nWrite a CUDA kernel for matrix multiplication\n\n### Response:\n"
inputs = tokenizer(prompt, return_tensors="pt").to("cuda")
outputs = model.generate(**inputs, max_new_tokens=512)
print(tokenizer.decode(outputs[0]))
"""

MERGED_SNIPPET = r"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(
    "./trained_deepseek/merged_model",
    torch_dtype=torch.float16,
    device_map="auto"
)
tokenizer = AutoTokenizer.from_pretrained("./trained_deepseek/merged_model")
"""


def test_the_snippets_are_the_seeds(shared: Path) -> None:
    seed = (shared / "seed-readme.pt.md").read_text(encoding="utf-8")
    for snippet in (ADAPTER_SNIPPET, MERGED_SNIPPET):
        assert f"```python\n{snippet}```" in seed


def run_script(folder: Path, script: str) -> str:
    """Run a script in a process of its own on the CPU, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_adapter_snippet_runs_and_answers_as_infer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path / "trained_deepseek", TINY_MODEL, base_name="builtin:tiny/model")
    script = ADAPTER_SNIPPET.replace("deepseek-ai/deepseek-coder-6.7b-base", str(TINY_MODEL)).replace('"cuda"', '"cpu"')
    printed = run_script(tmp_path, f"import torch\n{script}")

    monkeypatch.chdir(tmp_path)
    prompt = "Write a CUDA kernel for matrix multiplication"
    result = run_infer(InferConfig(dtype="float16", device="cpu"), prompt, lambda text: None, lambda notice: None)
    assert result.template == "instruction"
    expected = f"<｜begin▁of▁sentence｜>### Instruction:\n{prompt}\n\n### Response:\n{result.text}"
    assert printed.removesuffix("\n").removesuffix("<｜end▁of▁sentence｜>") == expected


# What the seed leaves to the reader: to generate with the model and tokenizer of its snippet.
ASK_MERGED = r"""
prompt = "### Instruction:\nWrite a CUDA kernel for matrix multiplication\n\n### Response:\n"
inputs = tokenizer(prompt, return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=64)
print(model.dtype, model.device.type)
print(tokenizer.decode(outputs[0]))
"""


def test_the_merged_model_snippet_runs_to_the_letter_and_answers_as_infer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "trained_deepseek", TINY_MODEL, base_name="builtin:tiny/model")
    monkeypatch.chdir(tmp_path)
    run_merge(MergeConfig("./trained_deepseek"), lambda event: None)
    kinds, _, printed = run_script(tmp_path, f"import torch\n{MERGED_SNIPPET}{ASK_MERGED}").partition("\n")
    assert kinds == "torch.float16 cpu"

    prompt = "Write a CUDA kernel for matrix multiplication"
    merged = InferConfig(model="./trained_deepseek/merged_model", dtype="float16", device="cpu", max_new_tokens=64)
    result = run_infer(merged, prompt, lambda text: None, lambda notice: None)
    assert result.template == "instruction" and result.text
    expected = f"<｜begin▁of▁sentence｜>### Instruction:\n{prompt}\n\n### Response:\n{result.text}"
    assert printed.removesuffix("\n").removesuffix("<｜end▁of▁sentence｜>") == expected
