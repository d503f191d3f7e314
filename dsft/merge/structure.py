"""What a model and its adapter consist of, asked of transformers and PEFT by a model without weights."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.core.errors import ModelError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class LowRankSite:
    """A module that an adapter adds a low-rank update to.

    Attributes:
        path: Its path in the base model.
        rank: Rank of the update.
        scaling: What the product of the factors is multiplied by.
        is_embedding: Whether it is an embedding; its factors have other names and are never those of a linear layer.
        is_transposed: Whether its weight is stored as inputs x outputs (GPT-2's Conv1D; every embedding).
        has_magnitudes: Whether the sum is scaled to learned magnitudes (DoRA, arXiv:2402.09353).
        has_bias: Whether the update has a bias of its own.
    """

    path: str
    rank: int
    scaling: float
    is_embedding: bool
    is_transposed: bool
    has_magnitudes: bool
    has_bias: bool


@dataclass(frozen=True)
class Structure:
    """A base model and where an adapter changes it.

    Attributes:
        architecture: Name of the model's class.
        shapes: Shape of every tensor of the base model, in its order.
        linear_weights: Weights that training quantizes.
        prefix: What the names of tensors may lack, or have too much, in a checkpoint of the model without its head.
        embedding: Name of the embedding's weight.
        head: Name of the output head's weight; None where there is none.
        is_tied: Whether the head is the embedding.
        sites: Low-rank updates by module path.
        saved_modules: Paths of modules that the adapter holds whole.
        token_indices: By path of an embedding, the rows that the adapter replaces.
        adapted: The base model with the adapter in place, all weights on the meta device.
    """

    architecture: str
    shapes: dict[str, tuple[int, ...]]
    linear_weights: frozenset[str]
    prefix: str
    embedding: str
    head: str | None
    is_tied: bool
    sites: dict[str, LowRankSite]
    saved_modules: frozenset[str]
    token_indices: dict[str, tuple[int, ...]]
    adapted: "PeftModel"


def build_empty_model(folder: Path, vocab_size: int | None = None) -> "PreTrainedModel":
    """Build a model from its config.json without memory for its weights; buffers that are computed are there.

    Args:
        folder: Holds config.json.
        vocab_size: Rows of the embedding; None takes the configuration's.

    Raises:
        ModelError: transformers knows no such model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if vocab_size is not None:
            config.vocab_size = vocab_size
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{folder / 'config.json'} describes no model that transformers can build: {first_line}",
            "Copy the model again, or install a transformers that knows it.",
        ) from error
    return model.eval()


def read_structure(
    folder: Path, adapter_config: "LoraConfig", replaced_shapes: Mapping[str, tuple[int, ...]]
) -> Structure:
    """Find out where an adapter changes a model.

    Args:
        folder: Holds the base model's config.json.
        adapter_config: The adapter's settings.
        replaced_shapes: Shapes of the adapter's tensors that take the place of the base's, by its names; an embedding
            of its own says how many tokens the model has.

    Raises:
        ModelError: The adapter does not fit the model, or changes a kind of module that dsft can't merge exactly.
    """
    from torch import nn

    model = build_empty_model(folder)
    embedding, weight = _find_embedding(model)
    own = replaced_shapes.get(embedding, tuple(weight.shape))
    if len(own) == 2 and own[0] not in (0, len(weight)):
        model = build_empty_model(folder, own[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    paths = {module: path for path, module in model.named_modules()}
    head = model.get_output_embeddings()
    linear = {f"{paths[each]}.weight" for each in model.modules() if type(each) is nn.Linear and each is not head}
    is_tied = head is not None and bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    head_name = None if head is None else f"{paths[head]}.weight"
    adapted = _put_on(model, adapter_config)
    sites, saved_modules, token_indices = _inspect(adapted)
    return Structure(
        architecture=type(model).__name__,
        shapes=shapes,
        linear_weights=frozenset(linear),
        prefix=f"{model.base_model_prefix}.",
        embedding=embedding,
        head=head_name,
        is_tied=is_tied,
        sites=sites,
        saved_modules=frozenset(saved_modules),
        token_indices=token_indices,
        adapted=adapted,
    )


def _find_embedding(model: "PreTrainedModel") -> "tuple[str, torch.Tensor]":
    embedding = model.get_input_embeddings()
    return next((f"{path}.weight", module.weight) for path, module in model.named_modules() if module is embedding)


def _put_on(model: "PreTrainedModel", adapter_config: "LoraConfig") -> "PeftModel":
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of tied weights, which the plan treats
            return get_peft_model(
                model, adapter_config, ADAPTER_NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            ).eval()
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"The adapter does not fit the base model: {first_line}", "Give the model it was trained on with --base."
        ) from error


def _inspect(adapted: "PeftModel") -> tuple[dict[str, LowRankSite], list[str], dict[str, tuple[int, ...]]]:
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    sites: dict[str, LowRankSite] = {}
    saved_modules: list[str] = []
    token_indices: dict[str, tuple[int, ...]] = {}
    for path, module in adapted.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved_modules.append(path)
        elif isinstance(module, TrainableTokensWrapper):
            token_indices[path] = tuple(module.token_adapter.token_indices[ADAPTER_NAME])
        elif isinstance(module, LoraLayer):
            sites[path] = _describe_site(path, module)
    nested = [path for path in sites if any(path.startswith(f"{saved}.") for saved in saved_modules)]
    if nested:
        raise ModelError(
            f"The adapter holds the module around {nested[0]} whole and adds a low-rank update inside it.",
            "Use it unmerged.",
        )
    return sites, saved_modules, token_indices


def _describe_site(path: str, module: Any) -> LowRankSite:
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    if type(module) not in (Linear, Embedding):
        raise ModelError(
            f"The adapter changes {path}, a {type(module.get_base_layer()).__name__}, and dsft merges linear layers "
            "and embeddings.",
            "Merge it with PEFT.",
        )
    variant = module.lora_variant.get(ADAPTER_NAME)
    if variant is not None and type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
        raise ModelError(
            f"The adapter changes {path} by {type(variant).__name__}, which dsft does not know.", "Merge it with PEFT."
        )
    is_embedding = type(module) is Embedding
    return LowRankSite(
        path=path,
        rank=module.r[ADAPTER_NAME],
        scaling=module.scaling[ADAPTER_NAME],
        is_embedding=is_embedding,
        is_transposed=is_embedding or bool(module.fan_in_fan_out),
        has_magnitudes=variant is not None,
        has_bias=bool(module.lora_bias[ADAPTER_NAME]),
    )
