"""Writing a GGUF file, tensor by tensor and a few rows at a time."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dsft.core.errors import DsftError
from dsft.merge.gguf.plan import ALIGNMENT_BYTES, GgufPlan, GgufTensor
from dsft.merge.gguf.rounding import round_rows
from dsft.merge.weights import MergedWeights
from dsft.merge.workers import count_workers, run_in_order

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter


def write_gguf(path: Path, plan: GgufPlan, weights: MergedWeights, on_bytes: Callable[[int], None]) -> None:
    """Write a GGUF file; one that could not be finished is left to the caller to remove.

    Args:
        path: The file.
        plan: What it holds.
        weights: Where its weights come from; each is rounded once, from float32.
        on_bytes: Told the bytes of weights written since it was last told; `plan.weight_bytes` in all.

    Raises:
        DsftError: A weight is NaN, infinite or too large for its type.
        OSError: The file can't be written.
    """
    _write_metadata(path, plan)
    with path.open("ab") as file:
        _fill_up(file)
        for tensor in plan.tensors:
            written_bytes = 0
            works = (
                partial(round_rows, rows, tensor.rounding, tensor.name) for rows in _read_rows(tensor, plan, weights)
            )
            with closing(run_in_order(works, count_workers("cpu"))) as pieces:
                for data in pieces:
                    file.write(data.data)
                    written_bytes += data.nbytes
                    on_bytes(data.nbytes)
            if written_bytes != tensor.num_bytes:
                raise DsftError(f"{tensor.name} came with {written_bytes} bytes of {tensor.num_bytes}.")
            _fill_up(file)


def _fill_up(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT_BYTES))


def _read_rows(tensor: GgufTensor, plan: GgufPlan, weights: MergedWeights) -> "Iterator[torch.Tensor]":
    import torch

    if tensor.source is None:
        yield torch.tensor(plan.model.rope.divisors, dtype=torch.float32)
    elif tensor.rotary_heads:
        head_dim = plan.model.shape.head_dim
        for rows in _in_whole_heads(weights.read_float32(tensor.source), head_dim):
            yield interleave_pairs(rows, head_dim)
    else:
        yield from weights.read_float32(tensor.source)


def interleave_pairs(rows: "torch.Tensor", head_dim: int) -> "torch.Tensor":
    """Reorder the rows of whole heads so that the two that are rotated together lie side by side.

    transformers rotates row i of a head with row i + head_dim/2; llama.cpp's llama rotates row 2i with row 2i + 1.
    """
    # (heads, halves, pairs, ...) -> (heads, pairs, halves, ...)
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _in_whole_heads(pieces: "Iterator[torch.Tensor]", head_dim: int) -> "Iterator[torch.Tensor]":
    """Cut rows anew, so that no piece ends within a head."""
    import torch

    rest: torch.Tensor | None = None
    for piece in pieces:
        rows = piece if rest is None else torch.cat((rest, piece))
        num_whole = len(rows) // head_dim * head_dim
        if num_whole:
            yield rows[:num_whole]
        rest = rows[num_whole:]
    if rest is not None and len(rest):
        yield rest


def _write_metadata(path: Path, plan: GgufPlan) -> None:
    """Write everything before the weights: keys, and where each tensor lies."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, plan.model.architecture)
    try:
        _add_model_keys(writer, plan)
        _add_tokenizer_keys(writer, plan)
        types = {
            "f32": GGMLQuantizationType.F32,
            "f16": GGMLQuantizationType.F16,
            "q8_0": GGMLQuantizationType.Q8_0,
        }
        for tensor in plan.tensors:
            raw_type = types[tensor.rounding]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_model_keys(writer: "GGUFWriter", plan: GgufPlan) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    model, shape = plan.model, plan.model.shape
    writer.add_name(plan.name)
    writer.add_file_type({"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}[plan.kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_blocks)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    if shape.num_query_values != shape.hidden_size:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(model.rope.frequency_base)
    if model.rope.linear_factor is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope.linear_factor)


def _add_tokenizer_keys(writer: "GGUFWriter", plan: GgufPlan) -> None:
    vocabulary = plan.vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos_id)
    for add, token_id in (
        (writer.add_bos_token_id, vocabulary.bos_id),
        (writer.add_pad_token_id, vocabulary.pad_id),
        (writer.add_unk_token_id, vocabulary.unknown_id),
        (writer.add_eot_token_id, vocabulary.end_of_turn_id),
        (writer.add_eom_token_id, vocabulary.end_of_message_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if plan.chat_template is not None:
        writer.add_chat_template(plan.chat_template)
