"""Which decoder a model gets."""

from typing import TYPE_CHECKING

from dsft.core.errors import describe_os_error
from dsft.core.notices import Notify
from dsft.core.triton_cache import place_triton_cache
from dsft.infer.decoding.decoder import Decoder
from dsft.infer.decoding.plain import PlainDecoder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_AMPERE = (8, 0)


def make_decoder(model: "PreTrainedModel | PeftModel", on_notice: Notify) -> Decoder:
    """Return the fastest decoder that can run a model.

    Args:
        model: The model, in evaluation mode, on its device.
        on_notice: Receives why a model on a GPU does not get the fast one.
    """
    if model.device.type != "cuda":
        return PlainDecoder(model)
    try:
        return _make_cuda_decoder(model, on_notice)
    except _SlowPathError as reason:
        on_notice(f"Decoding by transformers' own modules, which is several times slower: {reason}.")
        return PlainDecoder(model)


class _SlowPathError(Exception):
    pass


def _make_cuda_decoder(model: "PreTrainedModel | PeftModel", on_notice: Notify) -> Decoder:
    import torch

    if torch.cuda.get_device_capability(model.device) < _AMPERE:
        raise _SlowPathError("the GPU is older than Ampere (compute capability 8.0)")
    try:
        place_triton_cache(on_notice)
    except OSError as error:
        raise _SlowPathError(f"there is no folder for what Triton compiles ({describe_os_error(error)})") from error
    try:
        from dsft.infer.decoding.cuda.decoder import CudaDecoder
        from dsft.infer.decoding.cuda.weights import UnsupportedModelError
    except ImportError as error:
        raise _SlowPathError(f"Triton is missing ({error})") from error
    try:
        return CudaDecoder(model)
    except UnsupportedModelError as reason:
        raise _SlowPathError(str(reason)) from reason


def read_end_token_ids(model: "PreTrainedModel | PeftModel") -> list[int]:
    """Return the tokens that the model's own generation config ends at; nothing else of it counts here."""
    token_ids: int | list[int] | None = model.generation_config.eos_token_id
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)
