"""Which decoder a model gets."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dsft.core.errors import describe_os_error
from dsft.core.notices import Notify
from dsft.core.paths import triton_cache_dir
from dsft.core.private_folder import make_private_folder
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


def place_triton_cache(on_notice: Notify) -> None:
    """Let Triton keep what it compiles in dsft's cache folder, not in the user's home; where that is set, it counts.

    These files are run, so a folder that others could put some into is not used: this process has one of its own then.

    Args:
        on_notice: Receives why nothing is kept.

    Raises:
        OSError: There is no place for temporary files either.
    """
    if "TRITON_CACHE_DIR" in os.environ:
        return
    folder = triton_cache_dir()
    try:
        make_private_folder(folder)
    except OSError as error:
        on_notice(f"What Triton compiles is not kept in {folder}: {describe_os_error(error)}.")
        folder = Path(tempfile.mkdtemp(prefix="dsft-triton-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder)


def read_end_token_ids(model: "PreTrainedModel | PeftModel") -> list[int]:
    """Return the tokens that the model's own generation config ends at; nothing else of it counts here."""
    token_ids: int | list[int] | None = model.generation_config.eos_token_id
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)
