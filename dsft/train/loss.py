"""The loss of a micro-batch: summed cross-entropy over its target tokens, and nothing but those."""

import inspect
from functools import cache
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from dsft.train.batches import MicroBatch


def sum_target_losses(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Return the summed cross-entropy of a micro-batch's targets in nats, float32, shape [].

    Logits are computed at the positions that predict a target only, so prompts cost no vocabulary-sized row. The
    caller divides by the targets of the whole effective batch: a mean per micro-batch would weight tokens by how the
    batch was split (transformers#34191).
    """
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "cu_seq_lens_q": batch.sample_bounds,
        "cu_seq_lens_k": batch.sample_bounds,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
    }
    # [1, num_targets, vocabulary] -> [num_targets, vocabulary]
    if _takes_logit_positions(_innermost_class(model)):
        logits = model(**arguments, logits_to_keep=batch.logit_positions).logits.squeeze(0)
    else:
        logits = model(**arguments).logits.squeeze(0)[batch.logit_positions]
    return cross_entropy(logits.float(), batch.labels, reduction="sum")


def _innermost_class(model: Any) -> type:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model)


@cache
def _takes_logit_positions(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters
