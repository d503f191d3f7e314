"""What the embedded demo model is: shape, tokenizer and the files of its folder; `pretrain_tiny.py` trains it."""

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
SPECIAL_TOKENS = {  # name -> is special: DeepSeek-Coder's own names, order and flags, here on the last ids
    BOS: True,
    EOS: True,
    "<｜fim▁hole｜>": False,
    "<｜fim▁begin｜>": False,
    "<｜fim▁end｜>": False,
    "<pad>": False,
    "<|User|>": False,
    "<|Assistant|>": False,
    "<|EOT|>": False,
}
VOCAB_SIZE = 2048
BOS_ID = VOCAB_SIZE - len(SPECIAL_TOKENS)
EOS_ID = BOS_ID + 1
MAX_POSITIONS = 2048

MODEL_CONFIG: dict[str, Any] = {  # DeepSeek-Coder's fields; sizes are multiples of 64, which NF4 on a CPU needs
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": BOS_ID,
    # No pad_token_id: it equals EOS, and an embedding's padding row gets no gradient.
    "eos_token_id": EOS_ID,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": MAX_POSITIONS,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 6,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}

TOKENIZER_CONFIG: dict[str, Any] = {
    "backend": "tokenizers",
    "bos_token": BOS,
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS,
    "model_max_length": MAX_POSITIONS,
    "pad_token": EOS,
    "tokenizer_class": "TokenizersBackend",
}


def stop(found: str) -> NoReturn:
    """End the script with exit code 2 and one sentence on stderr."""
    print(f"pretrain_tiny: {found}", file=sys.stderr)
    raise SystemExit(2)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE of 2048 tokens with DeepSeek-Coder's way of splitting text and its special tokens.

    Args:
        texts: What the merges are learned from.

    Returns:
        The tokenizer; it puts BOS in front by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
            pre_tokenizers.Split(Regex("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BOS_ID, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if tokenizer.get_vocab_size() != BOS_ID:
        stop(f"the sources give only {tokenizer.get_vocab_size()} of {BOS_ID} tokens; more text is needed.")
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=special) for name, special in SPECIAL_TOKENS.items()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:0 $B:0", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def build_model(device: str) -> Any:
    """Make the untrained model in float32.

    Args:
        device: "cpu" or "cuda".

    Returns:
        A LlamaForCausalLM.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**copy.deepcopy(MODEL_CONFIG))  # which fills in nested fields
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.to(device)


def write_model(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Write the model in bfloat16 (the tied weight once) and the tokenizer into a new folder.

    Args:
        folder: Must not exist.
        model: The model to save; it is converted in place.
        tokenizer: As `train_tokenizer` makes it.
    """
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it the owner's alone
    # In DeepSeek-Coder's own spelling of the rope fields, which readers older than transformers 5 also understand.
    write_json(folder / "config.json", MODEL_CONFIG)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a dictionary as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_facts(folder: Path, facts: dict[str, Any], curve: list[dict[str, float]]) -> None:
    """Write pretraining.json and the model card.

    Args:
        folder: The model's folder.
        facts: What the run was and what came out.
        curve: Losses by step.
    """
    write_json(folder / "pretraining.json", facts | {"curve": curve})
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    (folder / "README.md").write_text(
        f"""---
language: code
license: apache-2.0
pipeline_tag: text-generation
---
# The embedded demo base model

A Llama of {facts["parameters"]:,} parameters in DeepSeek-Coder's shape (same block, same kind of tokenizer and special
tokens, linear rope scaling, tied embeddings), pretrained from scratch on the Python standard library's own sources. It
exists so that every command of dsft can be tried without a GPU and without a hub; it continues Python text and knows
little else.

Made by `scripts/pretrain_tiny.py`: plain next-token prediction on random windows, AdamW, cosine schedule, the weights
with the lowest validation loss kept. One file in ten, chosen by a hash of its path, is held out. Losses are in nats
per token. The training text is the Python Software Foundation's, under the PSF licence; none of it is in this folder.

| fact | value |
| --- | --- |
{rows}

The whole curve is in `pretraining.json`.
""",
        encoding="utf-8",
    )


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of another; the old one goes only when the new one stands."""
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)
