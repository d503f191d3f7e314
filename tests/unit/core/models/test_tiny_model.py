"""The committed base model of the embedded demo (`presets/tiny/model`): size, shape, tokenizer, and that it learned."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

MODEL = Path(__file__).parents[4] / "presets" / "tiny" / "model"
MAX_BYTES = 3_950_000

SOURCE = '''import os
import sys


class Node:
    """A node of a list."""

    def __init__(self, name, value=None):
        self.name = name
        self.value = value

    def __repr__(self):
        return "<%s %r>" % (self.__class__.__name__, self.name)


def main():
    for name in sys.argv[1:]:
        if not os.path.exists(name):
            raise ValueError("no such file")
        print(name)


if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_it_is_small_enough_for_the_repository():
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors", "pretraining.json"}
    assert {path.name for path in MODEL.iterdir()} == files | {"tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MAX_BYTES


def test_config_has_deepseek_coders_shape():
    config = json.loads((MODEL / "config.json").read_text("utf-8"))
    same_as_deepseek_coder = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 100000,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    }
    assert {name: config[name] for name in same_as_deepseek_coder} == same_as_deepseek_coder
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (2039, 2040, 2048)
    assert "pad_token_id" not in config  # the padding row of an embedding gets no gradient, and padding is EOS
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        assert config[name] % 64 == 0, "NF4 on a CPU needs multiples of 64"


def test_weights_are_bf16_and_the_tied_one_is_stored_once(model):
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_869_504


def test_rope_is_scaled_by_four(model):
    inv_freq = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(inv_freq, 1 / 4 / 100000 ** (torch.arange(0, 32, 2) / 32))


@pytest.mark.parametrize(
    "text", [SOURCE, "\tif x:\r\n\t\t y  =  1\n\n\n", "  größer 日本語 🎉\u00a0x ", "12345 0x1F $^~"]
)
def test_tokenizer_keeps_every_character(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 2039
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_have_deepseek_coders_names(tokenizer):
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
    names += ["<pad>", "<|User|>", "<|Assistant|>", "<|EOT|>"]
    assert tokenizer.convert_ids_to_tokens(list(range(2039, 2048))) == names
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2040, 2040, 2048)


def test_it_learned_python(model, tokenizer):
    ids = tokenizer(SOURCE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss < 3.0, "an untrained model has 7.6"


def test_rounding_to_bf16_cost_nothing():
    facts = json.loads((MODEL / "pretraining.json").read_text("utf-8"))
    assert facts["validation_loss"] == pytest.approx(facts["validation_loss_before_rounding_to_bf16"], abs=0.01)
