"""A small model for tests of gaps: it has DeepSeek-Coder's tokens around a gap, and fills every gap with one text."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from tests.scripted_models import make_tokenizer

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"


def write_fim_model(folder: Path, script: str, *, is_endless: bool = False, **settings: Any) -> Path:
    """Write a Llama that fills a gap with `script`, in which no byte may stand twice; endless, again and again."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)])
    body = tokenizer(script, add_special_tokens=False)["input_ids"]
    if len(set(body)) < len(body):
        raise ValueError("a byte stands twice in the script")
    end = body[0] if is_endless and body else tokenizer.eos_token_id
    chain = [tokenizer.convert_tokens_to_ids(FIM_END), *body, end]
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(shape | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()  # the block adds nothing: what comes next depends on the last token alone
        embedding = model.get_input_embeddings().weight.normal_()
        head = model.get_output_embeddings().weight.zero_()
        for token_id, successor in pairwise(chain):
            head[successor] += embedding[token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
