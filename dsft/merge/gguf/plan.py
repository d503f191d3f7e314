"""What a GGUF file will hold, decided and refused before a byte of it is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsft.core.errors import ModelError
from dsft.merge.config import GgufType
from dsft.merge.gguf.model import HEAD, GgufModel, read_gguf_model
from dsft.merge.gguf.vocabulary import GgufVocabulary, read_gguf_vocabulary
from dsft.merge.weights import MergedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dsft.merge.gguf.rounding import Rounding

ALIGNMENT_BYTES = 32
"""Tensors begin at multiples of this in a GGUF file that says nothing else."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: Its name there.
        shape: Its shape, as PyTorch counts dimensions.
        rounding: What its weights become.
        source: The merged tensor it is made of; None for the divisors of the rotary embedding.
        rotary_heads: Heads whose rows are reordered; 0 where rows stay as they are.
    """

    name: str
    shape: tuple[int, ...]
    rounding: "Rounding"
    source: MergedTensor | None
    rotary_heads: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of its weights."""
        from dsft.merge.gguf.rounding import rounded_bytes

        return rounded_bytes(self.shape, self.rounding)


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file that can be written.

    Attributes:
        kind: Type of its matrices.
        name: The model's name.
        model: The architecture.
        vocabulary: The tokenizer.
        chat_template: Jinja template of a chat; None where the model has none.
        tensors: Its tensors, in the order of the file.
    """

    kind: GgufType
    name: str
    model: GgufModel
    vocabulary: GgufVocabulary
    chat_template: str | None
    tensors: tuple[GgufTensor, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors: what `write_gguf` reports as it goes."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def most_file_bytes(self) -> int:
        """Bytes the file has at most; less than 128 KiB beyond those it has."""
        texts = (*self.vocabulary.tokens, *self.vocabulary.merges)
        # A text comes with its length (8 bytes), a token with its type (4).
        texts_bytes = sum(len(text.encode()) + 8 for text in texts) + 4 * len(self.vocabulary.tokens)
        free_texts_bytes = len(self.name.encode()) + len((self.chat_template or "").encode())
        # A tensor's name and length, dimensions, type and offset, and the gap behind its weights.
        records_bytes = sum(len(tensor.name) + 56 + ALIGNMENT_BYTES for tensor in self.tensors)
        return self.weight_bytes + texts_bytes + free_texts_bytes + records_bytes + 8192

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of this file, a sentence each."""
        found = []
        coarser = [tensor.name for tensor in self.tensors if self.kind == "q8_0" and tensor.rounding == "f16"]
        if coarser:
            found.append(
                f"{len(coarser)} matrices ({coarser[0]} first) have rows that are no multiple of 32 weights, so the "
                "GGUF holds them in f16 instead of q8_0."
            )
        if self.vocabulary.normalizes:
            found.append(
                "The tokenizer composes characters (NFC) before it splits text and llama.cpp does not: text in "
                "decomposed characters gets other ids there."
            )
        return tuple(found)


def plan_gguf(
    kind: GgufType,
    tensors: Sequence[MergedTensor],
    model_config: dict[str, Any],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    name: str,
    stop_token_ids: Sequence[int],
    chat_template: str | None,
) -> GgufPlan:
    """Decide what a GGUF file will hold.

    Matrices take the type asked for; one whose rows are no multiple of 32 weights takes f16 where that is q8_0. Norms,
    biases and everything else of one dimension stay in float32, as llama.cpp needs them.

    Args:
        kind: Type of the matrices.
        tensors: All tensors of the merged model.
        model_config: The content of its config.json.
        tokenizer: As `dsft.core.models.tokenizer` loads and checks it.
        name: The model's name.
        stop_token_ids: Tokens that end an answer.
        chat_template: Jinja template of a chat.

    Raises:
        ModelError: What of it can't be written so that llama.cpp computes the same.
    """
    model = read_gguf_model(model_config)
    return GgufPlan(
        kind=kind,
        name=name,
        model=model,
        vocabulary=read_gguf_vocabulary(tokenizer, model.shape.vocab_size, stop_token_ids),
        chat_template=chat_template,
        tensors=_plan_tensors(kind, tensors, model),
    )


def _plan_tensors(kind: GgufType, tensors: Sequence[MergedTensor], model: GgufModel) -> tuple[GgufTensor, ...]:
    # Old checkpoints hold the frequencies of their rotary embedding, which follow from config.json.
    merged = {tensor.name: tensor for tensor in tensors if not tensor.name.endswith("rotary_emb.inv_freq")}
    unknown = [name for name in merged if name not in model.tensors]
    missing = [name for name in model.tensors if name not in merged and not (name == HEAD and model.shape.is_tied)]
    for names, found in ((unknown, "has no place for in a GGUF"), (missing, "needs and the merged model lacks")):
        if names:
            raise ModelError(
                f"{names[0]} is a tensor that llama.cpp's {model.architecture} {found} ({len(names)} such).",
                "Merge without a GGUF file.",
            )
    planned = []
    if model.rope.divisors is not None:
        planned.append(GgufTensor("rope_freqs.weight", (len(model.rope.divisors),), "f32", None))
    for name, tensor in merged.items():
        expected = model.tensors[name]
        if tensor.shape != expected.shape:
            raise ModelError(
                f"{name} has the shape {tensor.shape}, and config.json says {expected.shape}.", "Copy the model again."
            )
        rounding = _rounding_of(kind, tensor.shape)
        planned.append(GgufTensor(expected.gguf_name, tensor.shape, rounding, tensor, expected.rotary_heads))
    return tuple(planned)


def _rounding_of(kind: GgufType, shape: tuple[int, ...]) -> "Rounding":
    from dsft.merge.gguf.rounding import Q8_BLOCK

    if len(shape) == 1:
        return "f32"
    return "f16" if shape[-1] % Q8_BLOCK else kind
