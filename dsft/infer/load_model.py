"""Loading a model to generate with: whole or base plus unmerged LoRA adapter, in full type or in NF4."""

import math
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.core.errors import ConfigError, ModelError, is_out_of_memory, take_first_line
from dsft.core.models.device import Device, torch_device
from dsft.core.models.nf4_model import check_complete, load_nf4_model
from dsft.core.models.source import ModelSource
from dsft.core.notices import Notify
from dsft.infer.dtype import DtypeName

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

_SAFE_WEIGHTS = "adapter_model.safetensors"
_PICKLED_WEIGHTS = "adapter_model.bin"


@dataclass(frozen=True)
class Placement:
    """Where and in which numbers a model is loaded.

    Attributes:
        device: The device.
        dtype: Type of weights and arithmetic.
        use_4bit: Quantize the linear layers to NF4 with double quantization, as training does.
    """

    device: Device
    dtype: DtypeName
    use_4bit: bool


def load_model(
    source: ModelSource, adapter_dir: Path | None, placement: Placement, on_notice: Notify = lambda _: None
) -> "PreTrainedModel | PeftModel":
    """Load a model in evaluation mode.

    Args:
        source: The whole model, or the base of the adapter.
        adapter_dir: Folder of a LoRA adapter to put on it, unmerged.
        placement: Device and number types.
        on_notice: Receives what became of the quantized copy.

    Raises:
        ModelError: Weights are missing, damaged, not finite or of another shape.
        ConfigError: 4-bit loading of a model that is quantized already.
    """
    model = _load_base(source, placement, on_notice)
    return model if adapter_dir is None else _attach_adapter(model, adapter_dir, source.name, placement.device)


def _load_base(source: ModelSource, placement: Placement, on_notice: Notify) -> "PreTrainedModel":
    import torch
    from safetensors import SafetensorError

    dtype = getattr(torch, placement.dtype)
    if placement.use_4bit and "quantization_config" in source.model_config:
        raise ConfigError(f"--load-in-4bit was given, but {source.name} is quantized already.", "Leave it out.")
    try:
        if placement.use_4bit:
            return load_nf4_model(source, placement.device, dtype, {}, on_notice)
        return _load_whole(source, placement.device, dtype)
    except (SafetensorError, OSError, ValueError, ImportError, RuntimeError, pickle.UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"The weights of {source.name} can't be loaded: {take_first_line(error)}",
            "The folder needs complete weights beside config.json; copy or download the model again.",
        ) from error


def _load_whole(source: ModelSource, device: Device, dtype: "torch.dtype") -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        source.location,
        dtype=dtype,
        device_map={"": torch_device(device)},
        output_loading_info=True,
        **source.load_arguments,
    )
    check_complete(report["missing_keys"], source)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _attach_adapter(model: "PreTrainedModel", adapter_dir: Path, base_name: str, device: Device) -> "PeftModel":
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError

    try:
        stored = _read_adapter_keys(adapter_dir)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of missing tensors; they are an error below
            adapted = PeftModel.from_pretrained(
                model, str(adapter_dir), torch_device=torch_device(device).type, local_files_only=True
            )
    except (SafetensorError, OSError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"The adapter {adapter_dir} can't be loaded: {take_first_line(error)}",
            "Copy it again from where it was saved.",
        ) from error
    except RuntimeError as error:  # torch's, for tensors of another shape
        if "size mismatch" not in str(error):
            raise
        raise ModelError(
            f"The adapter {adapter_dir} does not fit the base model {base_name}: its tensors have other shapes.",
            "Give the model it was trained on with --base.",
        ) from error
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := tensors.keys() - stored:
        raise ModelError(
            f"The adapter {adapter_dir} is incomplete for the base model {base_name}: {_name_some(missing)} missing.",
            "Copy the adapter again, or give the model it was trained on with --base.",
        )
    if surplus := stored - tensors.keys() - adapted.state_dict().keys():
        raise ModelError(
            f"The adapter {adapter_dir} belongs to another model: {base_name} has no place for {_name_some(surplus)}.",
            "Give the model it was trained on with --base.",
        )
    if damaged := [name for name, tensor in tensors.items() if not math.isfinite(tensor.float().sum().item())]:
        raise ModelError(
            f"The adapter {adapter_dir} holds NaN or infinite numbers in {_name_some(damaged)}.",
            "Train it again with a lower learning rate, or take an earlier checkpoint.",
        )
    return adapted.eval()


def _read_adapter_keys(adapter_dir: Path) -> set[str]:
    import torch
    from safetensors import safe_open

    if (adapter_dir / _SAFE_WEIGHTS).is_file():
        with safe_open(adapter_dir / _SAFE_WEIGHTS, framework="pt") as file:
            return set(file.keys())
    if (adapter_dir / _PICKLED_WEIGHTS).is_file():
        # An older format; weights_only keeps it from running code, here and in PEFT.
        return set(torch.load(adapter_dir / _PICKLED_WEIGHTS, map_location="meta", weights_only=True))
    raise FileNotFoundError(f"it has no {_SAFE_WEIGHTS}.")


def _name_some(names: Any) -> str:
    ordered = sorted(names)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} and {len(ordered) - 1} more tensors"
