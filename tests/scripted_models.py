"""Small models that tests of generation write to disk: one of random weights, one that says what it is told to."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, TURN_END = "<bos>", "<eos>", "<turn>"


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, so that every character outside ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, additional_special_tokens=[TURN_END]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def write_random_model(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Write a Llama of random weights with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    # The wide initialization makes answers that depend on the whole prompt instead of repeating one token.
    _save(folder, LlamaForCausalLM(_config(len(tokenizer), initializer_range=0.3, **settings)), tokenizer)
    return folder


def write_scripted_model(folder: Path, script: str, *, chat_template: str | None = None, **settings: Any) -> Path:
    r"""Write a Llama whose greedy answer to a prompt that ends in a line end is `script`.

    Each token has one successor, so no byte may stand twice in `script`. One that ends in a line end therefore begins
    again and again; any other is followed by the end token.
    """
    tokenizer = make_tokenizer(chat_template)
    chain = tokenizer("\n" + script, add_special_tokens=False)["input_ids"]
    if len(set(chain[1:])) < len(script.encode()):
        raise ValueError("a byte stands twice in the script")
    if not script.endswith("\n"):
        chain.append(tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(len(tokenizer), **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()  # the blocks add nothing: what comes next depends on the last token alone
        embedding = model.get_input_embeddings().weight.normal_()
        head = model.get_output_embeddings().weight.zero_()
        for token_id, successor in pairwise(chain):
            head[successor] += embedding[token_id]
    _save(folder, model, tokenizer)
    return folder


def write_adapter(
    folder: Path, base: Path, *, seed: int = 1, base_name: str | None = None, template: str | None = "instruction"
) -> PeftModel:
    """Write a random LoRA adapter as `dsft train` does, without a summary where template is None; return the model."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    if template is not None:
        write_summary(folder, base_name or str(base), template)
    return model.eval()


def write_summary(folder: Path, base_name: str, template: str) -> None:
    """Write the part of a run's summary that generation reads."""
    summary = {"template": template, "model": {"name": base_name, "revision": None}}
    (folder / "training_summary.json").write_text(json.dumps(summary))


def _config(vocab_size: int, **settings: Any) -> LlamaConfig:
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "bos_token_id": vocab_size - 3,
        "eos_token_id": vocab_size - 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(shape | settings))


def _save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
