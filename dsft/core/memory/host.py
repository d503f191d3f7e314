"""What a run takes of the host: memory, and disk for model, data, checkpoints and what it leaves; and a merge's memory.

Only `PROCESS_BYTES` is measured; the rest follows from the sizes of the files that dsft writes.
"""

from dataclasses import dataclass

from dsft.core.memory.model_shape import ModelShape, quantized_bytes, unquantized_bytes
from dsft.core.memory.training import Group, Term

PROCESS_BYTES = 1_135_000_000
"""Host memory of a training process without the model's mapped pages: Python, PyTorch, CUDA's host side, one batch.
Measured with the 6.7B shape on an H100 (docs/benchmarks/train-6.7b-h100.json: a peak of 14.616 GB, of which 13.481 GB
are the model's own pages)."""

MERGE_PROCESS_BYTES = 798_000_000
"""Host memory of a process that merges without any weights: Python, PyTorch with CUDA's libraries, transformers, PEFT.
What `merge_and_unload` of the 6.7B model took on an H100's host (docs/benchmarks/merge-6.7b.json: a peak of 15.1 GB)
beside weights, adapter and largest update."""

MERGE_PIECES_BYTES = 24 * 12 * 2**20
"""Pieces of a million weights under way in at most 8 threads: read in 16 bits, in float32, with the float32 update."""

MERGE_POSITIONS = 160
"""Positions at which a merge compares logits."""

ADAM_FACTOR = 3
"""A checkpoint has each LoRA weight and AdamW's two moments."""

LEAST_COPY_BYTES = 64 * 2**20
"""Of a smaller model no quantized copy is kept, as in `core/models/nf4_cache.py`, which imports too much for this."""

_LORA_BYTES = 4
_MODEL_BYTES = 2

_SHORT_ID_VOCABULARY = 1 << 16
"""Up to so many tokens an id is stored in two bytes."""


@dataclass(frozen=True)
class RunFiles:
    """What decides the host's share of a run.

    Attributes:
        shape: The model.
        rank: LoRA rank.
        num_checkpoints: Checkpoints that are kept.
        has_validation: Whether the adapter of the lowest validation loss is kept beside them.
        num_dataset_tokens: Tokens of the data set; None where nobody has counted them.
        paged_out_bytes: Optimizer state that has no room on the device.
        value_bytes: Bytes of a value in the compute type, which embedding, head and norms stay in.
    """

    shape: ModelShape
    rank: int
    num_checkpoints: int
    has_validation: bool
    num_dataset_tokens: int | None = None
    paged_out_bytes: int = 0
    value_bytes: int = 2


def estimate_host_memory(files: RunFiles) -> tuple[Term, ...]:
    """Predict the host memory of a training run, the model's file pages last: they are given back when needed."""
    model = _model_bytes(files.shape)
    paged = Term("optimizer state", files.paged_out_bytes, "paged, what has no room on the device", Group.LORA)
    return (
        Term("process", PROCESS_BYTES, "Python, PyTorch and CUDA's host side, as measured", Group.OVERHEAD),
        *([paged] if files.paged_out_bytes else []),
        Term("model, while it loads", model, "pages of its files, given back when needed", Group.WEIGHTS),
    )


def estimate_disk(files: RunFiles) -> tuple[Term, ...]:
    """Predict the disk that a run needs at most at once, with the model itself and with a merged one."""
    weights = files.shape.num_lora_weights(files.rank)
    adapter, checkpoint = _LORA_BYTES * weights, ADAM_FACTOR * _LORA_BYTES * weights
    count = files.num_checkpoints + 1
    model = _model_bytes(files.shape)
    terms = [Term("model", model, f"{files.shape.num_parameters:,} x 2 bytes", Group.WEIGHTS)]
    copy = sum(quantized_bytes(files.shape)) + unquantized_bytes(files.shape, files.value_bytes)
    if copy >= LEAST_COPY_BYTES:
        formula = f"in the cache: 4 bits a weight and its scales, the rest x {files.value_bytes} bytes"
        terms.append(Term("quantized copy", copy, formula, Group.WEIGHTS))
    if files.num_dataset_tokens is not None:
        terms.append(_cache_term(files.shape, files.num_dataset_tokens))
    formula = f"{files.num_checkpoints} kept and one being written x {weights:,} x 12 bytes"
    terms.append(Term("checkpoints", count * checkpoint, formula, Group.LORA))
    if files.has_validation:
        best = f"kept, and one being written x {weights:,} x 4 bytes"
        terms.append(Term("best adapter", 2 * adapter, best, Group.LORA))
    terms.append(Term("final adapter", adapter, f"{weights:,} x 4 bytes", Group.LORA))
    terms.append(Term("merged model, if made", model, f"{files.shape.num_parameters:,} x 2 bytes", Group.WEIGHTS))
    return tuple(terms)


def estimate_whole_merge(shape: ModelShape, rank: int) -> int:
    """Return the memory of merging as PEFT does: 16-bit weights and adapter whole, and the largest float32 update."""
    weights = _model_bytes(shape) + _LORA_BYTES * shape.num_lora_weights(rank)
    return MERGE_PROCESS_BYTES + weights + 4 * _largest_linear(shape)


def estimate_streamed_merge(shape: ModelShape, rank: int) -> int:
    """Return the memory of `dsft merge` with its verification.

    The largest linear layer is there once in float32, with its factors, pieces of weights in several threads, and the
    logits of the three models that are compared.
    """
    largest = max(shape.block_linears, key=lambda linear: linear.num_weights)
    weight = 4 * largest.num_weights + _LORA_BYTES * rank * (largest.num_inputs + largest.num_outputs)
    logits = 3 * 4 * MERGE_POSITIONS * shape.vocab_size
    return MERGE_PROCESS_BYTES + MERGE_PIECES_BYTES + weight + logits


def _largest_linear(shape: ModelShape) -> int:
    return max(linear.num_weights for linear in shape.block_linears)


def _cache_term(shape: ModelShape, num_tokens: int) -> Term:
    # An id, and whether it carries loss.
    per_token = (2 if shape.vocab_size <= _SHORT_ID_VOCABULARY else 4) + 1
    formula = f"{num_tokens:,} tokens x {per_token} bytes"
    return Term("tokenized data", num_tokens * per_token, formula, Group.ACTIVATIONS)


def _model_bytes(shape: ModelShape) -> int:
    return _MODEL_BYTES * shape.num_parameters
