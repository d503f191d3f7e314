"""What a block does between its matrix products: one Triton kernel each on a GPU, PyTorch's operations on a CPU.

Both compute in float32 and round once, at the end. Tensors may be columns of a wider buffer: only their last dimension
has to be dense.
"""

from typing import Any

import torch

_GATE_BLOCK = 1024
_LOSS_BLOCK = 4096
_HEADS_A_PROGRAM = 16


def normalize(states: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """Write RMSNorm (arXiv:1910.07467) of each row.

    Args:
        states: [outer, inner, width] or [outer, width].
        weight: [width].
        eps: Added to the mean of squares.
        out: Like states.

    Returns:
        1 / sqrt(mean of squares + eps) of each row, float32 [outer * inner].
    """
    if not states.is_cuda:
        values = states.float()
        rstd = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
        out.copy_(values * rstd * weight.float())
        return rstd.flatten()
    from dsft.core.engine import elementwise_kernels as kernels

    states, out = _in_three(states), _in_three(out)
    outer, inner, width = states.shape
    rstd = torch.empty(outer * inner, dtype=torch.float32, device=states.device)
    kernels.normalize[(outer * inner,)](
        states, weight, out, rstd, *states.stride()[:2], *out.stride()[:2], inner, width, eps, **_row_options(width)
    )
    return rstd


def normalize_backward(
    gradient: torch.Tensor,
    states: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    out: torch.Tensor,
    *,
    adds: bool,
    normalized: torch.Tensor | None = None,
) -> None:
    """Reverse `normalize`.

    Args:
        gradient: At what it gave out, [outer, inner, width] or [outer, width].
        states: What it was given.
        weight: [width].
        rstd: What it returned.
        out: Receives the gradient at the states; may be `gradient`.
        adds: Whether it is added to what `out` holds.
        normalized: Receives once more what `normalize` gave out.
    """
    if not gradient.is_cuda:
        scale = rstd.view(*states.shape[:-1], 1)
        normal = states.float() * scale
        inward = gradient.float() * weight.float()
        result = scale * (inward - normal * (inward * normal).mean(-1, keepdim=True))
        out.copy_(out.float() + result if adds else result)
        if normalized is not None:
            normalized.copy_(normal * weight.float())
        return
    from dsft.core.engine import elementwise_kernels as kernels

    gradient, states, out = _in_three(gradient), _in_three(states), _in_three(out)
    again = out if normalized is None else _in_three(normalized)
    outer, inner, width = states.shape
    strides = [stride for tensor in (gradient, states, out, again) for stride in tensor.stride()[:2]]
    kernels.normalize_backward[(outer * inner,)](
        gradient, states, weight, rstd, out, again, *strides, inner, width,
        ADDS=adds, REPEATS=normalized is not None, **_row_options(width),
    )  # fmt: skip


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, out: torch.Tensor) -> None:
    """Turn each head's pairs of numbers by the angle of its position (RoPE, arXiv:2104.09864).

    Args:
        states: [tokens, heads, head_dim]; the pairs are (i, i + head_dim / 2).
        cosines: [tokens, head_dim / 2].
        sines: [tokens, head_dim / 2].
        out: Like states; may be states.
    """
    if not states.is_cuda:
        _turn(states, cosines.float(), sines.float(), out)
        return
    from dsft.core.engine import elementwise_kernels as kernels

    num_tokens, num_heads, _ = states.shape
    heads = min(_HEADS_A_PROGRAM, 1 << (num_heads - 1).bit_length())
    kernels.rotate[(num_tokens, -(-num_heads // heads))](
        states, cosines, sines, out, *states.stride()[:2], *out.stride()[:2], cosines.stride(0), num_heads,
        HALF=states.shape[2] // 2, HEADS=heads,
    )  # fmt: skip


def rotate_back(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Turn queries and keys the other way, which reverses `rotate` and is its gradient, and lay values beside them.

    Args:
        queries: [tokens, num_heads, head_dim].
        keys: [tokens, num_kv_heads, head_dim].
        values: [tokens, num_kv_heads, head_dim].
        cosines: [tokens, head_dim / 2].
        sines: [tokens, head_dim / 2].
        out: All three side by side, [tokens, num_heads + 2 * num_kv_heads, head_dim], heads of a token dense.
    """
    first, second = queries.shape[1], queries.shape[1] + keys.shape[1]
    if not queries.is_cuda:
        _turn(queries, cosines.float(), -sines.float(), out[:, :first])
        _turn(keys, cosines.float(), -sines.float(), out[:, first:second])
        out[:, second:].copy_(values)
        return
    from dsft.core.engine import elementwise_kernels as kernels

    strides = [stride for tensor in (queries, keys, values) for stride in tensor.stride()[:2]]
    kernels.rotate_back[(len(queries), -(-out.shape[1] // _HEADS_A_PROGRAM))](
        queries, keys, values, cosines, sines, out, *strides, out.stride(0), cosines.stride(0), first, keys.shape[1],
        HALF=queries.shape[2] // 2, HEADS=_HEADS_A_PROGRAM,
    )  # fmt: skip


def _turn(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, out: torch.Tensor) -> None:
    half = states.shape[2] // 2
    first, second = states[..., :half].float(), states[..., half:].float()
    cosine, sine = cosines.unsqueeze(1), sines.unsqueeze(1)
    out.copy_(torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1))


def gate(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Write silu(gate) * up (SwiGLU, arXiv:2002.05202).

    Args:
        gate_up: [tokens, 2 * width]: gate, then up.
        out: [tokens, width].
    """
    width = out.shape[1]
    if not gate_up.is_cuda:
        values = gate_up.float()
        out.copy_(torch.nn.functional.silu(values[:, :width]) * values[:, width:])
        return
    from dsft.core.engine import elementwise_kernels as kernels

    kernels.gate[(len(out), -(-width // _GATE_BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=_GATE_BLOCK
    )


def gate_backward(gate_up: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor, gated: torch.Tensor) -> None:
    """Reverse `gate`.

    Args:
        gate_up: What it was given.
        gradient: At what it gave out, [tokens, width].
        out: Receives the gradients at gate and up, [tokens, 2 * width].
        gated: Receives once more what it gave out, [tokens, width]; may be `gradient`.
    """
    width = gradient.shape[1]
    if not gate_up.is_cuda:
        opened, values, upstream = gate_up[:, :width].float(), gate_up[:, width:].float(), gradient.float()
        share = torch.sigmoid(opened)
        out[:, :width].copy_(upstream * values * share * (1 + opened * (1 - share)))
        out[:, width:].copy_(upstream * opened * share)
        gated.copy_(opened * share * values)
        return
    from dsft.core.engine import elementwise_kernels as kernels

    kernels.gate_backward[(len(gradient), -(-width // _GATE_BLOCK))](
        gate_up, gradient, out, gated, gate_up.stride(0), gradient.stride(0), out.stride(0), gated.stride(0), width,
        BLOCK=_GATE_BLOCK,
    )  # fmt: skip


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, writes_gradient: bool) -> torch.Tensor:
    """Return each row's loss in nats and, if told so, leave its gradient where the logits were.

    Args:
        logits: [rows, vocab_size].
        labels: int64 [rows].
        writes_gradient: Whether the logits become softmax(logits) - onehot(labels).

    Returns:
        float32 [rows].
    """
    if not logits.is_cuda:
        chosen = labels.unsqueeze(1)
        values = logits.float()
        values = values - values.amax(dim=1, keepdim=True)
        label_values = values.gather(1, chosen)
        exponentials = values.exp_()
        sums = exponentials.sum(dim=1, keepdim=True)
        if writes_gradient:
            shares = exponentials.div_(sums)
            logits.copy_(shares.scatter_add_(1, chosen, torch.full_like(sums, -1.0)))
        return (sums.log() - label_values).squeeze(1)
    from dsft.core.engine import elementwise_kernels as kernels

    losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    kernels.cross_entropy[(len(labels),)](
        logits, labels, losses, logits.stride(0), logits.shape[1], WRITES_GRADIENT=writes_gradient, BLOCK=_LOSS_BLOCK,
        num_warps=8,
    )  # fmt: skip
    return losses


def _in_three(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(1)


def _row_options(width: int) -> dict[str, Any]:
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}
