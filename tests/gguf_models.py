"""Small models as GGUF files, and GGUF files read back as models, for the tests of both."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dsft.core.models.source import find_model
from dsft.core.models.tokenizer import load_tokenizer
from dsft.merge.config import GgufType
from dsft.merge.gguf.file import write_gguf
from dsft.merge.gguf.plan import GgufPlan, plan_gguf
from dsft.merge.weights import MergedTensor

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "linear rope": {"model_type": "llama", "rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "grouped heads": {"model_type": "llama", **GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "wide heads": {"model_type": "llama", **GQA, "head_dim": 32},
    "biases": {"model_type": "llama", **GQA, "attention_bias": True, "mlp_bias": True},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama3 rope": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", **GQA, "sliding_window": None},
    "qwen2": {
        "model_type": "qwen2",
        **GQA,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
    "qwen3": {"model_type": "qwen3", **GQA, "head_dim": 32, "tie_word_embeddings": True},
}
"""Settings of config.json beside the sizes below, by what is tried."""

_SIZES = {
    "vocab_size": 2080,  # more rows than the tokenizer has tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def small_config(**settings: Any) -> dict[str, Any]:
    """Return the content of a config.json."""
    return _SIZES | {"model_type": "llama"} | settings


def make_model(config: dict[str, Any]) -> PreTrainedModel:
    """Return a model of random weights, biases and norms too, whose logits depend on the whole prompt."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return model


@dataclass
class StateDictWeights:
    """The weights of a model in memory as a merge gives them, a few rows at a time.

    Attributes:
        state: Tensors by name.
        num_rows: Rows of a piece; no divisor of any size, so that pieces end within heads.
        told: Names in the order they were read.
    """

    state: dict[str, torch.Tensor]
    num_rows: int = 27
    told: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> tuple[MergedTensor, ...]:
        return tuple(MergedTensor(name, tuple(tensor.shape)) for name, tensor in self.state.items())

    def read_float32(self, tensor: MergedTensor) -> Iterator[torch.Tensor]:
        self.told.append(tensor.name)
        yield from self.state[tensor.name].float().split(self.num_rows)


def weights_of(model: PreTrainedModel) -> StateDictWeights:
    """Return a model's weights, a tied head left out."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return StateDictWeights(state)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the embedded model's tokenizer: DeepSeek-Coder's in small."""
    return load_tokenizer(find_model("builtin:tiny/model")).tokenizer


def plan_small(
    kind: GgufType,
    weights: StateDictWeights,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    **changes: Any,
) -> GgufPlan:
    """Return the plan of a small model's file."""
    settings = {"name": "small", "stop_token_ids": [tokenizer.eos_token_id], "chat_template": None} | changes
    return plan_gguf(kind, weights.tensors, config, tokenizer, **settings)


def write_small(path: Path, kind: GgufType, model: PreTrainedModel, config: dict[str, Any], **changes: Any) -> Path:
    """Write a small model with the embedded model's tokenizer."""
    weights = weights_of(model)
    write_gguf(path, plan_small(kind, weights, config, tiny_tokenizer(), **changes), weights, lambda _: None)
    return path


def read_fields(path: Path) -> dict[str, Any]:
    """Return the keys of a GGUF file with their values."""
    return {name: entry.contents() for name, entry in gguf.GGUFReader(path).fields.items() if "." in name}


def read_state(path: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a GGUF file under the names and in the order of rows that transformers has.

    Names come from gguf's own table and rows are put back one by one, so that nothing of what wrote them is used.
    """
    reader = gguf.GGUFReader(path)
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[
        reader.fields["general.architecture"].contents()
    ]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    stored = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name in AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict():
        tensor = stored.pop(names.get_name(name, try_suffixes=(".weight", ".bias")), None)
        if tensor is None:
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        values = values.reshape(shape)
        is_rotated = any(part in name for part in ("q_proj", "k_proj"))
        state[name] = (
            _rows_in_halves(values, reader) if is_rotated and architecture == gguf.MODEL_ARCH.LLAMA else values
        )
    stored.pop("rope_freqs.weight", None)
    assert not stored, f"nothing of transformers' is called {list(stored)}"
    return state


def _rows_in_halves(values: torch.Tensor, reader: gguf.GGUFReader) -> torch.Tensor:
    head_dim = int(reader.fields["llama.rope.dimension_count"].contents())
    rows = torch.empty_like(values)
    for row in range(len(values)):
        head, place = divmod(row, head_dim)
        pair, half = divmod(place, 2)
        rows[head * head_dim + half * (head_dim // 2) + pair] = values[row]
    return rows


def load_state(config: dict[str, Any], state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Return a model of given weights; a tied head is the embedding."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    return model


def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return the logits of all positions: (positions, vocabulary)."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]
