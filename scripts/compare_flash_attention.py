"""Compare the flash-attn package with PyTorch's variable-length kernel on one GPU: speed and exactness; prints JSON.

    python scripts/compare_flash_attention.py > flash-attention.json

Shapes are those of the 6.7B model's attention, bf16 and causal: 4,096 tokens as 4 samples of 1,024, and 2,400 tokens as
16 samples of about 150. Seconds are medians over rounds of several synchronized calls, both kernels taking turns;
`kernels_s` counts the GPU's kernels alone, as PyTorch's profiler sees them, forward and backward. Errors of outputs and
gradients are against scaled_dot_product_attention in float32, sample by sample, over the same bf16 values.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dsft.core.models.attention import attend_varlen
from dsft.core.versions import versions

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
NAMES = ("output", "query_gradient", "key_gradient", "value_gradient")


@dataclass(frozen=True)
class Inputs:
    """What both kernels compute with.

    Attributes:
        streams: Queries, keys and values, [tokens, heads, head_dim], leaves that want gradients.
        upstream: The gradient at the output.
        lengths: Tokens of each sample.
        bounds: Where each sample begins and ends, int32 [samples + 1].
    """

    streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    upstream: torch.Tensor
    lengths: list[int]
    bounds: torch.Tensor


def make_inputs(lengths: list[int], num_heads: int, head_dim: int, device: str, dtype: torch.dtype) -> Inputs:
    """Draw normally distributed inputs for samples of these lengths."""
    drawn = [torch.randn(sum(lengths), num_heads, head_dim, device=device, dtype=dtype) for _ in range(4)]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    query, key, value = (each.requires_grad_() for each in drawn[:3])
    return Inputs((query, key, value), drawn[3], lengths, bounds)


def draw_lengths(num_samples: int, num_tokens: int) -> list[int]:
    """Draw lengths around their mean, none near zero or twice it, that add up to a number of tokens."""
    mean = num_tokens // num_samples
    lengths: list[int] = torch.randint(mean // 3, mean * 5 // 3, (num_samples,)).tolist()
    # What is over or short goes round, token by token.
    for index in itertools.cycle(range(num_samples)):
        missing = num_tokens - sum(lengths)
        if missing == 0:
            break
        lengths[index] += 1 if missing > 0 else -1
    return lengths


def attend_by_package(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """Attend by the flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(query, key, value, bounds, bounds, longest, longest, causal=True)
    return output


def attend_built_in(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """Attend by PyTorch's variable-length kernel, as dsft calls it."""
    query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
    # Neither the module nor the mask is looked at.
    module: Any = None
    return attend_varlen(module, query, key, value, None, cu_seq_lens_q=bounds, max_length_q=longest)[0].squeeze(0)


KERNELS: dict[str, Kernel] = {"flash_attn": attend_by_package, "built_in": attend_built_in}


def attend_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """Attend sample by sample with all scores written out."""
    with sdpa_kernel(SDPBackend.MATH):
        outputs = []
        for start, end in itertools.pairwise(bounds.tolist()):
            q, k, v = (each[start:end].transpose(0, 1) for each in (query, key, value))
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
    return torch.cat(outputs)


def run_both_ways(kernel: Kernel, inputs: Inputs) -> list[torch.Tensor]:
    """Return the output and the gradients at queries, keys and values."""
    output = kernel(*inputs.streams, inputs.bounds, max(inputs.lengths))
    return [output, *torch.autograd.grad(output, inputs.streams, inputs.upstream)]


def find_reference(inputs: Inputs) -> list[torch.Tensor]:
    """Return the same in float32 from the same values."""
    query, key, value = (each.detach().float().requires_grad_() for each in inputs.streams)
    wide = Inputs((query, key, value), inputs.upstream.float(), inputs.lengths, inputs.bounds)
    return run_both_ways(attend_reference, wide)


def find_errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Return the relative error in the Euclidean norm and the largest absolute one of each result."""
    errors = {}
    for name, ours, reference in zip(NAMES, found, expected, strict=True):
        difference = ours.float() - reference
        relative = difference.norm() / reference.norm()
        errors[name] = {"relative": relative.item(), "largest": difference.abs().max().item()}
    return errors


def time_calls(work: Callable[[], object], num_calls: int) -> float:
    """Return the seconds of one call out of several in a row, synchronized."""
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(num_calls):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started_s) / num_calls


def time_kernels(work: Callable[[], object], num_calls: int) -> dict[str, float]:
    """Return the seconds that each of the GPU's kernels takes in one call, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        time_calls(work, num_calls)
    events: Any = profiler.key_averages()
    on_gpu = [event for event in events if event.device_type.name == "CUDA"]
    seconds: dict[str, float] = {}
    for event in on_gpu:
        # Template arguments fill lines.
        name = str(event.key).partition("<")[0]
        seconds[name] = seconds.get(name, 0.0) + event.self_device_time_total / 1e6 / num_calls
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def time_in_turns(inputs: Inputs, options: argparse.Namespace, is_backward: bool) -> dict[str, list[float]]:
    """Return the seconds of each round for each kernel, the kernels taking turns."""

    def forward(kernel: Kernel) -> object:
        return kernel(*inputs.streams, inputs.bounds, max(inputs.lengths))

    def both_ways(kernel: Kernel) -> object:
        return run_both_ways(kernel, inputs)

    work = both_ways if is_backward else forward
    rounds: dict[str, list[float]] = {name: [] for name in KERNELS}
    for index in range(options.warmup + options.rounds):
        # Which one goes first changes: it could find the caches or clocks of the other.
        for name in sorted(KERNELS, reverse=index % 2 == 1):
            seconds = time_calls(lambda name=name: work(KERNELS[name]), options.calls)  # type: ignore[misc]
            if index >= options.warmup:
                rounds[name].append(seconds)
    return rounds


def compare(lengths: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Return times and errors of both kernels for samples of these lengths."""
    inputs = make_inputs(lengths, options.heads, options.head_dim, "cuda", torch.bfloat16)
    expected = find_reference(inputs)
    results = {name: run_both_ways(kernel, inputs) for name, kernel in KERNELS.items()}
    errors = {name: find_errors(found, expected) for name, found in results.items()}
    is_output_the_same = torch.equal(results["flash_attn"][0], results["built_in"][0])
    del expected, results
    forward, both_ways = (time_in_turns(inputs, options, is_backward) for is_backward in (False, True))
    kernels: dict[str, dict[str, Any]] = {}
    for name, kernel in KERNELS.items():
        by_name = time_kernels(lambda kernel=kernel: run_both_ways(kernel, inputs), options.calls)  # type: ignore[misc]
        kernels[name] = {
            "forward_s": statistics.median(forward[name]),
            "forward_and_backward_s": statistics.median(both_ways[name]),
            "slowest_forward_and_backward_s": max(both_ways[name]),
            "kernels_s": sum(by_name.values()),
            "kernels_by_name_s": by_name,
            "errors": errors[name],
        }
    theirs, ours = (kernels[name]["forward_and_backward_s"] for name in ("flash_attn", "built_in"))
    return {
        "lengths": lengths,
        "num_tokens": sum(lengths),
        "kernels": kernels,
        "flash_attn_time_per_built_in": theirs / ours,
        "flash_attn_kernels_time_per_built_in": kernels["flash_attn"]["kernels_s"] / kernels["built_in"]["kernels_s"],
        "is_output_the_same": is_output_the_same,
    }


def main() -> None:
    """Compare on all shapes and print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them")
    parser.add_argument("--calls", type=int, default=20, help="calls a round")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found. Run this on a GPU of compute capability 8.0 or newer.")
    try:
        import flash_attn
    except ImportError as error:
        parser.error(f"the flash-attn package can't be imported ({error}). Install it: it is what is compared.")
    torch.manual_seed(options.seed)
    shapes = [[1024] * 4, draw_lengths(16, 2400)]
    record = {
        "versions": versions() | {"flash-attn": flash_attn.__version__},
        "gpu": torch.cuda.get_device_name(),
        "settings": vars(options),
        "dtype": "bfloat16",
        "shapes": [compare(lengths, options) for lengths in shapes],
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
