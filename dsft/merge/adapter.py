"""Reading an adapter as PEFT saved it: its settings, what of them dsft can merge exactly, and its tensors."""

import dataclasses
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsft.core.errors import MergeError, ModelError
from dsft.core.models.weight_files import open_weight_file
from dsft.merge.weights import is_finite

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"
SAFE_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

_EXACT_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA) change it."""

_INEXACT_SETTINGS = {
    "layer_replication": "the adapter's model has other layers than its base",
    "alora_invocation_tokens": "it is active only after certain tokens",
    "arrow_config": "a router chooses between adapters for each token",
    "target_parameters": "it changes parameters that are no linear layer's",
    "use_qalora": "its input is pooled in groups",
    "velora_config": "dsft does not know this variant",
    "monteclora_config": "its update is drawn at random",
    "kasa_config": "dsft does not know this variant",
    "use_bdlora": "its matrices are in blocks",
    "megatron_config": "its layers are split over devices",
}
"""Settings with which one fixed weight would not compute what the adapter does, or not as dsft adds it."""

_REOPENED_AFTER_BYTES = 64 * 2**20


class AdapterWeights(Protocol):
    """The tensors of an adapter by name, read one at a time."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        ...

    def read(self, name: str) -> "torch.Tensor":
        """Return a tensor as it is stored."""
        ...


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: Where it is.
        config: Its settings.
        weights: Its tensors.
    """

    folder: Path
    config: "LoraConfig"
    weights: AdapterWeights


def open_adapter(folder: Path) -> Adapter:
    """Open an adapter and refuse what can't be merged exactly.

    Raises:
        ModelError: It is missing, damaged, or of a kind whose effect is no change of weights that dsft can compute.
    """
    config = _read_config(folder)
    return Adapter(folder, config, _open_weights(folder))


def check_finite(adapter: Adapter) -> None:
    """Refuse an adapter with NaN or infinite numbers.

    Raises:
        MergeError: The first tensor that holds one.
    """
    for name in sorted(adapter.weights.names):
        if not is_finite(adapter.weights.read(name)):
            raise MergeError(
                f"The adapter {adapter.folder} holds NaN or infinite numbers in {name}.",
                "Train it again with a lower learning rate, or take an earlier checkpoint.",
            )


def _read_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig

    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}.", "Copy the adapter again.") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise ModelError(f"{path} is of a {kind} adapter, and dsft merges LoRA adapters.", "Merge it with PEFT.")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name, value in settings.items():
        if name not in known and value not in (None, False):
            raise _refuse(path, name, value, "dsft does not know this setting")
        if name in _INEXACT_SETTINGS and value:
            raise _refuse(path, name, value, _INEXACT_SETTINGS[name])
    start = settings.get("init_lora_weights", True)
    if start not in _EXACT_STARTS:
        raise _refuse(
            path, "init_lora_weights", start, "training changed the base weights, and the adapter does not hold them"
        )
    try:
        config = LoraConfig(**{name: value for name, value in settings.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} is no adapter's: {error}.", "Copy the adapter again.") from error
    config.inference_mode = True
    return config


def _refuse(path: Path, name: str, value: Any, reason: str) -> ModelError:
    return ModelError(f"{path} has {name}: {value!r}; {reason}, so no merged weight is exact.", "Use it unmerged.")


def _open_weights(folder: Path) -> AdapterWeights:
    if (folder / SAFE_WEIGHTS).is_file():
        return _SafeWeights(folder / SAFE_WEIGHTS)
    if (folder / PICKLED_WEIGHTS).is_file():
        return _PickledWeights(folder / PICKLED_WEIGHTS)
    raise ModelError(f"{folder} has no {SAFE_WEIGHTS}.", "Copy the adapter again from where it was saved.")


class _SafeWeights:
    def __init__(self, path: Path) -> None:
        self._files = open_weight_file(path)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def read(self, name: str) -> "torch.Tensor":
        return self._files.read(name)


class _PickledWeights:
    """Tensors of torch's older format, loaded without running code from it.

    The file is mapped, and mapped anew before too many of its pages are in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = self._open()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self._num_read_bytes = 0

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> "torch.Tensor":
        if self._num_read_bytes > _REOPENED_AFTER_BYTES:
            self._tensors = {}
            self._tensors = self._open()
            self._num_read_bytes = 0
        tensor = self._tensors[name].clone()
        self._num_read_bytes += tensor.nbytes
        return tensor

    def _open(self) -> "dict[str, torch.Tensor]":
        import torch

        try:
            try:
                tensors = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before PyTorch 1.6 can't be mapped
                tensors = torch.load(self._path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"{self._path} can't be read as plain tensors: {first_line}", "Save the adapter as safetensors."
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ModelError(f"{self._path} holds something else than tensors.", "Save the adapter as safetensors.")
        return tensors
