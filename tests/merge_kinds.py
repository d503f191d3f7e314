"""The kinds of adapter that PEFT makes, each on the kind of base where it matters."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["llama", "qwen2", "gpt2"]

_ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Kind:
    """One kind of adapter on one kind of base.

    Attributes:
        name: Name of the test.
        settings: The adapter's, as PEFT's LoraConfig takes them.
        family: The base's architecture.
        is_tied: Whether the base's head is its embedding.
        num_new_tokens: Tokens added to the vocabulary before training.
        stays_tied: Whether one tensor can still be both in the merged model.
        is_peft_wrong: Whether PEFT's merge_and_unload gives another model: it adds an update to a tensor that two
            modules share, and so to both.
    """

    name: str
    settings: dict[str, Any] = field(hash=False)
    family: Family = "llama"
    is_tied: bool = False
    num_new_tokens: int = 0
    stays_tied: bool = False
    is_peft_wrong: bool = False

    def __str__(self) -> str:
        return self.name


def _plain_kinds() -> Iterator[Kind]:
    yield Kind("all-linear", {"target_modules": "all-linear"})
    yield Kind("list", {"target_modules": _ATTENTION})
    yield Kind("regex", {"target_modules": r".*\.1\.(self_attn\.o|mlp\.down)_proj"})
    yield Kind("excluded", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]})
    yield Kind("one-layer", {"target_modules": _ATTENTION, "layers_to_transform": [1]})
    yield Kind("rslora", {"target_modules": _ATTENTION, "use_rslora": True})
    patterns = {
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"down_proj": 5, "layers.0.self_attn.v_proj": 64},
    }
    yield Kind("patterns", {"target_modules": "all-linear", **patterns})
    yield Kind("rslora-patterns", {"target_modules": "all-linear", "use_rslora": True, **patterns})
    yield Kind("bias-all", {"target_modules": _ATTENTION, "bias": "all"}, "qwen2")
    yield Kind("bias-lora-only", {"target_modules": _ATTENTION, "bias": "lora_only"}, "qwen2")
    yield Kind("lora-bias", {"target_modules": _ATTENTION, "lora_bias": True}, "qwen2")
    yield Kind("lora-bias-and-all", {"target_modules": _ATTENTION, "lora_bias": True, "bias": "all"}, "qwen2")


def _dora_kinds() -> Iterator[Kind]:
    yield Kind("dora", {"target_modules": "all-linear", "use_dora": True})
    yield Kind("dora-rslora", {"target_modules": _ATTENTION, "use_dora": True, "use_rslora": True})
    yield Kind("dora-embedding", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True})
    yield Kind("dora-bias", {"target_modules": _ATTENTION, "use_dora": True, "bias": "all"}, "qwen2")


def _whole_module_kinds() -> Iterator[Kind]:
    for modules in (["lm_head"], ["embed_tokens"], ["norm"], ["mlp"], ["lm_head", "embed_tokens", "norm"]):
        yield Kind(f"saved-{'-'.join(modules)}", {"target_modules": _ATTENTION, "modules_to_save": modules})
    yield Kind("saved-attention", {"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]})
    yield Kind("saved-block", {"target_modules": ["layers.0.self_attn.q_proj"], "modules_to_save": ["layers.1"]})
    # PEFT adds no update inside of a module that is saved whole.
    yield Kind("saved-around", {"target_modules": ["up_proj", "q_proj"], "modules_to_save": ["mlp"]})
    # PEFT then saves the bias of the original module too, which nothing uses.
    saved = {"target_modules": ["up_proj"], "modules_to_save": ["q_proj"], "bias": "all"}
    yield Kind("saved-bias-all", saved, "qwen2")
    yield Kind("embedding-and-head", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]})
    yield Kind("tokens", {"target_modules": _ATTENTION, "trainable_token_indices": [3, 5, 200]})
    by_layer = {"embed_tokens": [3, 5], "lm_head": [7]}
    yield Kind("tokens-of-head", {"target_modules": _ATTENTION, "trainable_token_indices": by_layer})


def _tied_kinds() -> Iterator[Kind]:
    plain: dict[str, Any] = {"target_modules": _ATTENTION}
    both = {"ensure_weight_tying": True}
    yield Kind("tied", plain, is_tied=True, stays_tied=True)
    yield Kind("tied-saved-head", plain | {"modules_to_save": ["lm_head"]}, is_tied=True)
    yield Kind("tied-saved-embedding", plain | {"modules_to_save": ["embed_tokens"]}, is_tied=True)
    yield Kind("tied-saved-both", plain | both | {"modules_to_save": ["embed_tokens"]}, is_tied=True, stays_tied=True)
    tokens = plain | {"trainable_token_indices": [3, 5, 200]}
    yield Kind("tied-tokens", tokens, is_tied=True, stays_tied=True)
    tokens = plain | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}}
    yield Kind("tied-tokens-of-both", tokens, is_tied=True, stays_tied=True)
    wrong: dict[str, Any] = {"is_tied": True, "is_peft_wrong": True}
    yield Kind("tied-tokens-of-head", plain | {"trainable_token_indices": {"lm_head": [3, 5]}}, **wrong)
    tokens = plain | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}}
    yield Kind("tied-tokens-that-differ", tokens, **wrong)
    yield Kind("tied-lora-embedding", {"target_modules": ["q_proj", "embed_tokens"]}, **wrong)
    yield Kind("tied-lora-head", {"target_modules": ["q_proj", "lm_head"]}, **wrong)
    yield Kind("tied-lora-each", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, **wrong)
    yield Kind("tied-dora-head", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, **wrong)
    yield Kind("tied-dora-embedding", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, **wrong)
    saved = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    yield Kind("tied-saved-head-lora-embedding", saved, is_tied=True)
    yield Kind("tied-lora-both", {"target_modules": ["q_proj", "embed_tokens"], **both}, stays_tied=True, **wrong)


def _conv1d_kinds() -> Iterator[Kind]:
    every = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    gpt2: dict[str, Any] = {"family": "gpt2", "is_tied": True, "stays_tied": True}
    yield Kind("conv1d", every, **gpt2)
    yield Kind("conv1d-dora", every | {"use_dora": True}, **gpt2)
    yield Kind("conv1d-bias", every | {"bias": "all"}, **gpt2)
    yield Kind("conv1d-lora-bias", every | {"lora_bias": True}, **gpt2)
    yield Kind("conv1d-saved", {"target_modules": ["c_attn"], "modules_to_save": ["ln_1", "wpe", "mlp"]}, **gpt2)
    positions = {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True}
    yield Kind("conv1d-positions", positions, **gpt2)


def _resized_kinds() -> Iterator[Kind]:
    yield Kind("resized", {"target_modules": _ATTENTION}, num_new_tokens=3)
    yield Kind("resized-tied", {"target_modules": _ATTENTION}, num_new_tokens=3, is_tied=True, stays_tied=True)
    lora = {"target_modules": [*_ATTENTION, "embed_tokens", "lm_head"]}
    yield Kind("resized-lora", lora, num_new_tokens=3)
    saved = {"target_modules": _ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
    yield Kind("resized-saved", saved, num_new_tokens=3)
    tokens = {"target_modules": _ATTENTION, "trainable_token_indices": [259, 260, 261]}
    yield Kind("resized-tokens", tokens, num_new_tokens=3)
    tied: dict[str, Any] = {"num_new_tokens": 3, "is_tied": True}
    yield Kind("resized-tied-tokens", tokens, stays_tied=True, **tied)
    yield Kind("resized-tied-saved", saved, **tied)
    lora = {"target_modules": [*_ATTENTION, "embed_tokens"]}
    yield Kind("resized-tied-lora-embedding", lora, is_peft_wrong=True, **tied)


KINDS = (
    *_plain_kinds(),
    *_dora_kinds(),
    *_whole_module_kinds(),
    *_tied_kinds(),
    *_conv1d_kinds(),
    *_resized_kinds(),
)
PLAIN = KINDS[0]
