"""GGUF files as llama.cpp reads them: the tokenizer's ids, transformers' logits and its greedy text.

llama-cpp-python is no dependency of dsft. These tests run where `import llama_cpp` works, or where the environment
variable DSFT_LLAMA_CPP_PYTHON is the path of a Python interpreter in which it does; elsewhere they are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dsft.core.models.known_tokenizers import DEEPSEEK_CODER
from dsft.core.models.source import find_model
from dsft.core.models.tokenizer import load_tokenizer
from dsft.merge.gguf.file import write_gguf
from tests.conftest import REPOSITORY
from tests.gguf_models import (
    SMALL_MODELS,
    load_state,
    logits_of,
    make_model,
    plan_small,
    read_state,
    small_config,
    tiny_tokenizer,
    weights_of,
    write_small,
)
from tests.gguf_tokenizers import DIGITS, WORDS, byte_level, random_texts, sequence, split, train_tokenizer

PYTHON = os.environ.get("DSFT_LLAMA_CPP_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
PROBE = REPOSITORY / "tests" / "llama_cpp_probe.py"

pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs llama-cpp-python, or DSFT_LLAMA_CPP_PYTHON set")


def ask(path: Path, **asked: Any) -> dict[str, Any]:
    request = {"texts": [], "add_bos": False, "prompts": [], "num_new": 0} | asked
    completed = subprocess.run(
        [str(PYTHON), str(PROBE), str(path)], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    return json.loads(completed.stdout)


def write_vocabulary(path: Path, tokenizer: PreTrainedTokenizerFast, num_rows: int, stops: list[int]) -> Path:
    """Write a model of no use but for its tokenizer."""
    config = small_config(vocab_size=num_rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    weights = weights_of(make_model(config))
    write_gguf(path, plan_small("f16", weights, config, tokenizer, stop_token_ids=stops), weights, lambda _: None)
    return path


PROMPTS = (
    "### Instruction:\nWrite a Python function times_four(n)\n### Response:\n",
    "import os\n",
    "class Stack:\n    def __init__(self):\n",
    "if __name__ == ",
    "self.assertEqual(",
)


@pytest.mark.parametrize("name", ["published", "embedded"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_deepseek_coders_ids_are_the_tokenizers(tmp_path: Path, shared: Path, name, add_bos) -> None:
    folder = shared / "assets" / "deepseek-coder-6.7b"
    tokenizer = load_tokenizer(find_model(str(folder))).tokenizer if name == "published" else tiny_tokenizer()
    vectors = (folder / "tokenizer_vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    texts = [text for text in vectors if text] + [text for text, _ in DEEPSEEK_CODER.vectors] + random_texts(1000)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|EOT|>")]
    path = write_vocabulary(tmp_path / "m.gguf", tokenizer, 32256 if name == "published" else 2080, ends)
    answer = ask(path, texts=texts, add_bos=add_bos)
    assert answer["ids"] == tokenizer(texts, add_special_tokens=add_bos)["input_ids"]
    assert answer["ends"] == ends


@pytest.mark.parametrize(
    ("ignore_merges", "steps"),
    [
        (False, byte_level(True)),
        (False, sequence(DIGITS, byte_level(True))),
        (True, sequence(split(WORDS % r"\p{N}{1,3}"), byte_level(False))),
        (False, sequence(split(WORDS % r"\p{N}"), byte_level(False))),
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2"],
)
def test_other_tokenizers_ids_are_the_tokenizers(tmp_path: Path, repository: Path, ignore_merges, steps) -> None:
    documents = [path.read_text(encoding="utf-8") for path in sorted((repository / "docs").glob("*.md"))]
    tokenizer = train_tokenizer(documents, steps, ignore_merges)
    texts = random_texts(1000) + [document[start : start + 300] for document in documents for start in (0, 777, 1999)]
    path = write_vocabulary(tmp_path / "m.gguf", tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    assert ask(path, texts=texts)["ids"] == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("settings", SMALL_MODELS.values(), ids=SMALL_MODELS)
@pytest.mark.parametrize(("kind", "most_off"), [("f16", 0.002), ("q8_0", 0.05)])
def test_logits_are_transformers(tmp_path: Path, settings, kind, most_off) -> None:
    config = small_config(**settings)
    path = write_small(tmp_path / "m.gguf", kind, make_model(config), config)
    ids = [(7 * place) % 2000 for place in range(200)]
    expected = logits_of(load_state(config, read_state(path, config)), ids)
    answer = torch.tensor(ask(path, prompts=[ids])["logits"][0])
    # llama.cpp rounds activations too: to float16, or to 8 bits where the weights are q8_0.
    assert (answer - expected).abs().mean() < most_off * expected.std()


def test_the_embedded_model_writes_the_same_greedy_text(tmp_path: Path) -> None:
    source = find_model("builtin:tiny/model")
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(source.location, dtype=torch.float32).eval()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(24):
            likeliest = logits_of(model, ids)[-1].topk(2)
            assert likeliest.values[0] - likeliest.values[1] > 0.03, "a tie: take another prompt"
            ids.append(int(likeliest.indices[0]))
        expected.append(ids[len(prompt) :])
    path = write_small(tmp_path / "m.gguf", "f16", model, source.model_config)
    assert ask(path, prompts=prompts, num_new=24)["greedy"] == expected
