"""Loading a model in NF4, for training and generation: from a copy that is quantized already where there is one."""

import gc
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dsft.core.errors import ModelError
from dsft.core.models.device import Device, torch_device
from dsft.core.models.nf4_cache import keep_copy, opened_copy
from dsft.core.models.nf4_file import CopyFile, DamagedCopyError, is_storable
from dsft.core.models.nf4_key import make_copy_key
from dsft.core.models.source import ModelSource
from dsft.core.notices import Notify

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QUANTIZATION = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
"""NF4 with double quantization (QLoRA, arXiv:2305.14314, section 3), as BitsAndBytesConfig calls it."""

_CONVERSIONS = "conversions"


def load_nf4_model(
    source: ModelSource,
    device: Device,
    dtype: "torch.dtype",
    options: Mapping[str, Any],
    on_notice: Notify,
) -> "PreTrainedModel":
    """Load a model with its linear layers in NF4 with double quantization, in evaluation mode.

    The first start reads the whole weights, quantizes them and keeps a copy in the cache folder; later ones read that,
    about a quarter as much. Either way transformers builds the model, so that both are the same to the last bit.

    Args:
        source: The model.
        device: Where it goes.
        dtype: Number type of what is not quantized, and of the matrix products.
        options: What else `from_pretrained` is told; nothing that changes weights.
        on_notice: Receives what became of the copy.

    Raises:
        ModelError: Weights are missing, or of another shape than config.json says.
        Exception: Whatever `from_pretrained` raises.
    """
    place = torch_device(device)

    def load(copy: CopyFile | None = None) -> "PreTrainedModel":
        return _load(source, place, dtype, options, copy)

    key = make_copy_key(source, device, dtype, QUANTIZATION)
    if key is None:
        return load()
    is_damaged = False
    try:
        with opened_copy(key, on_notice) as copy:
            if copy is not None:
                return load(copy)
    except DamagedCopyError as error:
        on_notice(f"The quantized copy of {source.name} was damaged ({error}) and is made anew.")
        is_damaged = True
    if is_damaged:
        gc.collect()  # what was filled from it would lie beside the next model until its cycles are found
    model = load()
    tensors = _collect_tensors(model)
    if tensors is not None:
        keep_copy(key, tensors, {_CONVERSIONS: _describe_conversions(model._weight_conversions)}, on_notice)
    return model


def _load(
    source: ModelSource,
    place: "torch.device",
    dtype: "torch.dtype",
    options: Mapping[str, Any],
    copy: CopyFile | None,
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arguments = {
        "quantization_config": BitsAndBytesConfig(**QUANTIZATION, bnb_4bit_compute_dtype=dtype),
        "dtype": dtype,
        "device_map": {"": place},
        "output_loading_info": True,
        **source.load_arguments,
    }
    if copy is None:
        model, report = AutoModelForCausalLM.from_pretrained(source.location, **arguments, **options)
    else:
        model, report = _read_from(copy, place, source, arguments, options)
    check_complete(report["missing_keys"], source)
    _check_shapes(model, source)
    loaded: PreTrainedModel = model.eval()
    return loaded


def check_complete(missing: "set[str] | list[str]", source: ModelSource) -> None:
    """Refuse a model that lacks weights: transformers fills them with random numbers.

    Raises:
        ModelError: There are missing ones.
    """
    if missing:
        first, *rest = sorted(missing)
        what = f"{first} and {len(rest)} more tensors" if rest else first
        raise ModelError(
            f"The weights of {source.name} are incomplete: {what} missing.", "Copy or download the model again."
        )


def _check_shapes(model: "PreTrainedModel", source: ModelSource) -> None:
    """Refuse weights of another shape than config.json says: quantized ones are loaded without a look at it."""
    for name, module in _quantized_modules(model):
        found, expected = tuple(module.weight.quant_state.shape), (module.out_features, module.in_features)
        if found != expected:
            raise ModelError(
                f"{name} of {source.name} has the shape {list(found)}, and its config.json says {list(expected)}.",
                "Weights and config.json are not of the same model; copy or download it again.",
            )


def _quantized_modules(model: "PreTrainedModel") -> Iterator[tuple[str, Any]]:
    from bitsandbytes.nn import Linear4bit

    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))


def _collect_tensors(model: "PreTrainedModel") -> "dict[str, torch.Tensor] | None":
    """Return what a copy of a model holds, or None where it has anything that a copy can't give back.

    Buffers that are no part of a checkpoint are left out: transformers computes them whenever it builds a model. It
    also ties what is tied.
    """
    import torch
    from bitsandbytes.nn import Params4bit

    stored = set(model.state_dict())
    found: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if name not in stored:
            continue
        first = owners.setdefault(id(tensor), name)
        if first != name:
            if model.all_tied_weights_keys.get(name) != first:
                return None
            continue
        found[name] = tensor.detach().as_subclass(torch.Tensor)
        if isinstance(tensor, Params4bit):
            for part, content in tensor.quant_state.as_dict(packed=True).items():
                found[f"{name}.{part}"] = content
        elif type(tensor) not in {torch.nn.Parameter, torch.Tensor}:
            return None
    is_whole = stored == found.keys() | (model.all_tied_weights_keys.keys() & stored)
    return found if is_whole and all(is_storable(tensor) for tensor in found.values()) else None


def _read_from(
    copy: CopyFile, place: "torch.device", source: ModelSource, arguments: dict[str, Any], options: Mapping[str, Any]
) -> Any:
    """Let transformers build a model and take its weights from a copy instead of its checkpoint.

    It has no public way for weights that are quantized and on the device already, so the reading of a checkpoint is
    overridden in a class of its own for this one call. What comes before and after reading stays transformers'.

    Returns:
        What `from_pretrained` returns, for the same arguments.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config, others = AutoConfig.from_pretrained(
        source.location, return_unused_kwargs=True, **options, **source.load_arguments
    )
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if config.sub_configs.get("text_config") is model_class.config_class:
        config = config.get_text_config()  # of a model for images too, only the part for text is loaded

    def read_copy(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
        result = model_class._load_pretrained_model(model, {}, None, load_config, *rest)
        filled = _fill(model, copy, place)
        result[0].missing_keys.difference_update(filled)
        used = copy.notes[_CONVERSIONS]
        model._weight_conversions = [
            each for each in load_config.weight_mapping if _describe_conversions([each])[0] in used
        ]
        return result

    # Its names are the original's: transformers finds renamings, losses and recorded outputs by them.
    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    reader: Any = type(
        model_class.__name__, (model_class,), {**names, "_load_pretrained_model": staticmethod(read_copy)}
    )
    model, report = reader.from_pretrained(source.location, config=config, **(others | arguments))
    model.__class__ = model_class
    return model, report


def _describe_conversions(conversions: Any) -> list[list[list[str]]]:
    """Return by what the renamings that a checkpoint needed are found again."""
    return [[list(each.source_patterns), list(each.target_patterns)] for each in conversions]


def _fill(model: "PreTrainedModel", copy: CopyFile, place: "torch.device") -> set[str]:
    """Give a model without weights those of a copy, and return their names."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    names = set(model.state_dict())
    own, parts = _sort_names(copy, names)
    if names - own - model.all_tied_weights_keys.keys():
        raise DamagedCopyError("it is of another model")
    tensors = {
        # What describes the quantization is read here, not by the device.
        name: torch.empty(shape, dtype=dtype, device="cpu" if ".quant_state." in name else place)
        for name, (dtype, shape) in copy.layouts.items()
    }
    copy.read_into(tensors)
    for name in own:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        value: Any = tensors[name]
        if isinstance(module, Linear4bit) and attribute == "weight":
            value = Params4bit.from_prequantized(
                value, {part: tensors[f"{name}.{part}"] for part in parts[name]}, device=place, module=module
            )
        elif value.shape != getattr(module, attribute).shape:
            raise DamagedCopyError("it is of another model")
        elif attribute in module._parameters:
            value = torch.nn.Parameter(value, requires_grad=value.is_floating_point())
        value._is_hf_initialized = True  # transformers would start it at random
        setattr(module, attribute, value)
    return own


def _sort_names(copy: CopyFile, names: set[str]) -> tuple[set[str], dict[str, list[str]]]:
    """Tell the names of a copy that are the model's from those of parts of quantized weights."""
    own = copy.layouts.keys() & names
    parts: dict[str, list[str]] = {name: [] for name in own}
    for name in copy.layouts.keys() - own:
        owner, found, part = name.rpartition(".weight.")
        if not found or f"{owner}.weight" not in own:
            raise DamagedCopyError("it is of another model")
        parts[f"{owner}.weight"].append(part)
    return own, parts
