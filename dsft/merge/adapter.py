"""Reading an adapter as PEFT saved it: its settings, what of them dsft can merge exactly, and its tensors."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from dsft.core.errors import ModelError
from dsft.core.json_file import read_json_object
from dsft.core.models.find_run import ADAPTER_FILE
from dsft.core.models.weight_files import open_weight_file

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

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

_FLOAT_TYPES = ("float16", "bfloat16", "float32", "float64")
_POINTER_START = b"version https://git-lfs.github.com/"

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
        """Return a tensor as it is stored, in memory of its own."""
        ...

    def read_rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        """Return the rows (first dimension) from `first` up to but not including `last`, in memory of their own."""
        ...

    def close(self) -> None:
        """Let go of the file."""
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


def _read_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig

    path = folder / ADAPTER_FILE
    settings = read_json_object(path, "adapter")
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
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
        _check_is_there(folder / SAFE_WEIGHTS)
        return _SafeWeights(folder / SAFE_WEIGHTS)
    if (folder / PICKLED_WEIGHTS).is_file():
        _check_is_there(folder / PICKLED_WEIGHTS)
        return _PickledWeights(folder / PICKLED_WEIGHTS)
    raise ModelError(f"{folder} has no {SAFE_WEIGHTS}.", "Copy the adapter again from where it was saved.")


def _check_is_there(path: Path) -> None:
    """Refuse a file that stands for the weights without holding them."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER_START))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error}.", "Copy the adapter again.") from error
    if not start:
        raise ModelError(f"{path} is empty.", "Copy the adapter again from where it was saved.")
    if start == _POINTER_START:
        raise ModelError(
            f"{path} is a pointer of Git LFS, and not the weights themselves.",
            "Fetch them with `git lfs pull`, or download the adapter again.",
        )


def _check_is_float(path: Path, name: str, dtype: "torch.dtype") -> None:
    word = str(dtype).removeprefix("torch.")
    if word not in _FLOAT_TYPES:
        raise ModelError(
            f"{path} holds {name} as numbers of the type {word}, and dsft merges those of {', '.join(_FLOAT_TYPES)}.",
            "Save the adapter in one of these types.",
        )


class _SafeWeights:
    def __init__(self, path: Path) -> None:
        self._files = open_weight_file(path)
        for name in self._files.tensors:
            _check_is_float(path, name, self._files.dtype(name))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def read(self, name: str) -> "torch.Tensor":
        return self._files.read(name)

    def read_rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        return self._files.read_rows(name, first, last)

    def close(self) -> None:
        self._files.close()


class _PickledWeights:
    """Tensors of torch's older format, loaded without running code from it.

    The file is mapped, and mapped anew before too many of its pages are in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = self._open()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self._num_read_bytes = 0
        self._reopening = Lock()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> "torch.Tensor":
        return self._find(name, None).clone()

    def read_rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        return self._find(name, slice(first, last)).clone()

    def close(self) -> None:
        self._tensors = {}

    def _find(self, name: str, rows: slice | None) -> "torch.Tensor":
        with self._reopening:  # several threads may read
            if self._num_read_bytes > _REOPENED_AFTER_BYTES:
                self._tensors = {}
                self._tensors = self._open()
                self._num_read_bytes = 0
            tensor = self._tensors[name] if rows is None else self._tensors[name][rows]
            self._num_read_bytes += tensor.nbytes
            return tensor

    def _open(self) -> "dict[str, torch.Tensor]":
        import torch

        try:
            try:
                tensors = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before PyTorch 1.6 can't be mapped
                tensors = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle of anything else may raise whatever it likes; torch's advice is to run it
            raise ModelError(
                f"{self._path} can't be read as plain tensors: it is damaged, or holds other objects.",
                "Copy the adapter again, or have whoever trained it save it as safetensors.",
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ModelError(f"{self._path} holds something else than tensors.", "Save the adapter as safetensors.")
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                kind = "on the meta device, without its numbers" if tensor.device.type == "meta" else "sparse"
                raise ModelError(f"{self._path} holds {name}, which is {kind}.", "Save the adapter as safetensors.")
            _check_is_float(self._path, name, tensor.dtype)
        return {str(name): tensor for name, tensor in tensors.items()}
