"""The loss of a micro-batch: summed cross-entropy over its target tokens, and nothing but those."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dsft.core.engine.elementwise import cross_entropy
from dsft.core.memory.loss_chunks import chunk_rows
from dsft.train.batches import MicroBatch


def sum_target_losses(model: torch.nn.Module, batch: MicroBatch, *, is_fused: bool = False) -> torch.Tensor:
    """Return the summed cross-entropy of a micro-batch's targets in nats, float32, shape [].

    Logits are computed at the positions that predict a target only, a chunk of rows at a time, so neither prompts nor
    long batches cost more vocabulary-sized rows than a chunk has. The caller divides by the targets of the whole
    effective batch: a mean per micro-batch would weight tokens by how the batch was split (transformers#34191).

    Args:
        model: A causal language model, with LoRA or without.
        batch: The micro-batch, on the model's device.
        is_fused: Whether the engine's kernel takes logits in the compute type, and leaves their gradient there.
    """
    outer: Any = model
    causal_lm = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    hidden = causal_lm.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seq_lens_q=batch.sample_bounds,
        cu_seq_lens_k=batch.sample_bounds,
        max_length_q=batch.longest,
        max_length_k=batch.longest,
    ).last_hidden_state
    # [1, num_tokens, hidden_size] -> [num_targets, hidden_size]
    states = hidden.squeeze(0)[batch.logit_positions]
    scaling = getattr(causal_lm.config, "logits_scaling", 1.0)  # Granite divides its logits
    if scaling != 1.0:
        states = states / scaling
    apply: Any = _HeadLoss.apply
    total: torch.Tensor = apply(states, causal_lm.get_output_embeddings().weight, batch.labels, is_fused)
    return total


class _HeadLoss(torch.autograd.Function):
    """Output head and cross-entropy in one, for a head that is not trained.

    With logits z = W·h, the loss of a row is log Σ exp(z) - z[label] and its gradient at h is Wᵀ·(softmax(z) - onehot).
    Both come from the same chunk of logits, so forward keeps only the gradient at h (num_targets x hidden_size values)
    and no product is done twice.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, is_fused: bool = False
    ) -> torch.Tensor:
        """Return the summed loss.

        Args:
            ctx: Where the gradient is kept.
            states: [num_targets, hidden_size].
            weight: [vocab_size, hidden_size].
            labels: int64 [num_targets].
            is_fused: See `sum_target_losses`.
        """
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        rows = chunk_rows(weight.shape[0])
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = torch.mm(states[part], weight.t())  # [rows, vocab_size]
            if is_fused:
                total += cross_entropy(logits, labels[part], writes_gradient=gradient is not None).sum()
                if gradient is not None:
                    torch.mm(logits, weight, out=gradient[part])
                del logits
                continue
            logits = logits.float()
            chosen = labels[part].unsqueeze(1)
            logits -= logits.amax(dim=1, keepdim=True)
            label_logits = logits.gather(1, chosen)
            exponentials = logits.exp_()
            sums = exponentials.sum(dim=1, keepdim=True)
            total += (sums.log() - label_logits).sum()
            if gradient is not None:
                probabilities = exponentials.div_(sums)
                probabilities.scatter_add_(1, chosen, torch.full_like(sums, -1.0))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[part])
                del probabilities
            del logits, exponentials  # before the next chunk's: the loop's names would keep two chunks alive
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Return the gradient at the states."""
        (gradient,) = ctx.saved_tensors
        return gradient * factor, None, None, None
