"""Where a step's time goes: GPU kernels sorted by their names, and the shares of a step's time; no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["matrix products", "dequantization", "attention", "optimizer", "elementwise and copies"]

GPU_IDLE = "GPU idle"

_WORDS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    # The order matters: attention kernels have CUTLASS types in their names, optimizers' elementwise ones.
    ("dequantization", ("dequant",)),
    ("attention", ("flash", "fmha", "attention")),
    ("optimizer", ("optimizer", "multi_tensor", "adam")),
    ("matrix products", ("gemm", "cutlass", "xmma", "sm80_", "sm86_", "sm89_", "sm90_", "nvjet", "cublas", "splitk")),
)


@dataclass(frozen=True)
class KernelSpan:
    """A kernel, copy or fill as it ran on the GPU.

    Attributes:
        name: As the profiler calls it.
        start_ns: When it began.
        end_ns: When it ended.
    """

    name: str
    start_ns: int
    end_ns: int


def classify_kernel(name: str) -> Kind:
    """Return which kind of work a kernel of this name does."""
    lower = name.lower()
    return next((kind for kind, words in _WORDS if any(word in lower for word in words)), "elementwise and copies")


def share_step_time(spans: Sequence[KernelSpan], step_ns: float) -> dict[str, float]:
    """Return the share of each kind of work, and of none, in a step's time; they add up to 1.

    Args:
        spans: What ran on the GPU in the step.
        step_ns: Time of such a step without the profiler, which makes launches slower.
    """
    busy_ns = dict.fromkeys([*(kind for kind, _ in _WORDS), "elementwise and copies"], 0.0)
    for span in spans:
        busy_ns[classify_kernel(span.name)] += span.end_ns - span.start_ns
    total_ns = sum(busy_ns.values())
    # Kernels of two streams can overlap: what they took together is less than their sum.
    overlap = _covered_ns(spans) / total_ns if total_ns else 1.0
    whole_ns = max(step_ns, total_ns * overlap)
    if whole_ns <= 0:
        return {}
    shares = {str(kind): spent * overlap / whole_ns for kind, spent in busy_ns.items()}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return {**dict(ordered), GPU_IDLE: 1 - sum(shares.values())}


def share_wall_clock(seconds: dict[str, float]) -> dict[str, float]:
    """Return the share of each phase in the sum of all."""
    total = sum(seconds.values())
    return {name: spent / total for name, spent in seconds.items()} if total > 0 else {}


def _covered_ns(spans: Iterable[KernelSpan]) -> int:
    covered = end_ns = 0
    for span in sorted(spans, key=lambda span: span.start_ns):
        start_ns = max(span.start_ns, end_ns)
        if span.end_ns > start_ns:
            covered += span.end_ns - start_ns
            end_ns = span.end_ns
    return covered
