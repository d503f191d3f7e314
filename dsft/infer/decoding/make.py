"""Which decoder a model gets."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsft.infer.decoding.decoder import Decoder
from dsft.infer.decoding.plain import PlainDecoder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def make_decoder(model: "PreTrainedModel | PeftModel", on_notice: Callable[[str], None]) -> Decoder:
    """Return the fastest decoder that can run a model.

    Args:
        model: The model, in evaluation mode, on its device.
        on_notice: Receives why a model on a GPU does not get the fast one.
    """
    return PlainDecoder(model)


def read_end_token_ids(model: "PreTrainedModel | PeftModel") -> list[int]:
    """Return the tokens that the model's own generation config ends at; nothing else of it counts here."""
    token_ids: int | list[int] | None = model.generation_config.eos_token_id
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)
