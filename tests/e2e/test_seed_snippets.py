"""The seed document's own Python snippets, run to the letter against folders as dsft writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.infer.config import InferConfig
from dsft.infer.run import run_infer
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


def test_the_snippets_are_the_seeds(shared: Path) -> None:
    assert f"```python\n{ADAPTER_SNIPPET}```" in (shared / "seed-readme.pt.md").read_text(encoding="utf-8")


def test_the_adapter_snippet_runs_and_answers_as_infer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path / "trained_deepseek", TINY_MODEL, base_name="builtin:tiny/model")
    script = ADAPTER_SNIPPET.replace("deepseek-ai/deepseek-coder-6.7b-base", str(TINY_MODEL)).replace('"cuda"', '"cpu"')
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", f"import torch\n{script}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr

    monkeypatch.chdir(tmp_path)
    prompt = "Write a CUDA kernel for matrix multiplication"
    result = run_infer(InferConfig(prompt, dtype="float16", device="cpu"), lambda text: None, lambda notice: None)
    assert result.template == "instruction"
    expected = f"<｜begin▁of▁sentence｜>### Instruction:\n{prompt}\n\n### Response:\n{result.text}"
    assert done.stdout.removesuffix("\n").removesuffix("<｜end▁of▁sentence｜>") == expected
