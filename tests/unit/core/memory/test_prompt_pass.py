"""The tape of a prompt's pass against the decoder's own code, its kernels replaced by ones that do nothing."""

import ast
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from dsft.core.memory import generation, prompt_pass
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, ModelShape, in_blocks, read_model_shape
from dsft.core.memory.prompt_pass import PromptPass, fuse_linears, pad_rank, pass_bytes, prompt_bytes
from tests.unit.core.memory.live_bytes import LiveBytes

SHAPE = read_model_shape(BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"], "6.7b")
MIB = 1024**2

SMALL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "as many key heads": SMALL,
    "grouped heads": SMALL | {"num_key_value_heads": 1},
    "many wide heads": SMALL | {"head_dim": 128, "num_key_value_heads": 1},
    "one block": SMALL | {"num_hidden_layers": 1},
    "a large vocabulary": SMALL | {"vocab_size": 90_000},
    "biases": SMALL | {"model_type": "qwen2"},
    "norms of heads": SMALL | {"model_type": "qwen3", "head_dim": 64},
}
PACKAGE = "dsft.infer.decoding.cuda"


class IdleKernel:
    """Does nothing with what it gets, and does not hold it either."""

    def __init__(self, function: Any) -> None:
        pass

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@pytest.fixture(scope="module")
def cuda() -> SimpleNamespace:
    """The decoder's modules, imported with a Triton whose kernels do nothing; real ones come back afterwards."""
    names = [name for name in sys.modules if name == "triton" or name.startswith(("triton.", PACKAGE))]
    real = {name: sys.modules.pop(name) for name in names}
    triton = MagicMock(jit=IdleKernel)
    fake = {"triton": triton, "triton.language": triton.language, "triton.errors": triton.errors}
    sys.modules.update(fake)
    try:
        modules = {part: importlib.import_module(f"{PACKAGE}.{part}") for part in ("passes", "products", "weights")}
    finally:
        for name in [name for name in sys.modules if name in fake or name.startswith(PACKAGE)]:
            del sys.modules[name]
        sys.modules.update(real)
    return SimpleNamespace(**modules)


def make_linear(
    cuda: SimpleNamespace, linears: tuple[Any, ...], rank: int, is_4bit: bool, there: list[torch.Tensor]
) -> Any:
    """Return some layers side by side, of any numbers."""
    num_inputs, widths = linears[0].num_inputs, tuple(linear.num_outputs for linear in linears)
    weights: Any = torch.zeros(sum(widths), num_inputs, dtype=torch.bfloat16)
    there.append(weights)
    if is_4bit:
        small = torch.zeros(1)
        weights = [cuda.products.Nf4Rows(small, small, small, small, small, small, sum(widths))]
    bias = torch.zeros(sum(widths), dtype=torch.bfloat16) if any(linear.has_bias for linear in linears) else None
    update = None
    if rank:
        rows_a, rows_b = (
            torch.zeros(*size, dtype=torch.bfloat16) for size in ((len(widths) * rank, num_inputs), (sum(widths), rank))
        )
        there += [rows_a, rows_b]
        update = cuda.products.Update(rows_a, rows_b, rank, widths)
    return cuda.products.FusedLinear(weights, bias, update, num_inputs, torch.bfloat16)


def make_passes(
    cuda: SimpleNamespace, shape: ModelShape, rank: int, is_4bit: bool, capacity: int
) -> tuple[Any, list[torch.Tensor]]:
    """Return the decoder's passes through a model of a shape, and the tensors that are there before one."""
    there: list[torch.Tensor] = []
    norm = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    head_norm = torch.ones(shape.head_dim) if shape.normalized_head_values else None

    def make_block() -> Any:
        attention_input, attention_output, mlp_input, mlp_output = (
            make_linear(cuda, linears, rank, is_4bit, there) for linears in fuse_linears(shape)
        )
        return cuda.weights.BlockWeights(
            norm, attention_input, head_norm, head_norm, attention_output, norm, mlp_input, mlp_output
        )

    table = torch.zeros(shape.vocab_size, shape.hidden_size, dtype=torch.bfloat16)
    weights = cuda.weights.ModelWeights(
        embedding=table, blocks=tuple(make_block() for _ in range(shape.num_blocks)), norm=norm, head=table,
        rotary=torch.nn.Identity(), num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_dim, eps=1e-6,
    )  # fmt: skip
    size = (shape.num_blocks, 1, shape.num_kv_heads, capacity, shape.head_dim)
    keys, values = (torch.zeros(size, dtype=torch.bfloat16) for _ in range(2))
    turns = torch.zeros(capacity, shape.head_dim)
    there += [norm, table, keys, values, turns]
    return cuda.passes.Passes(weights, cuda.passes.Cache(keys, values, turns, turns), is_adapted=True), there


@pytest.mark.parametrize("is_4bit", [True, False])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_pass_takes_what_the_decoder_s_code_takes(cuda: SimpleNamespace, name: str, rank: int, is_4bit: bool) -> None:
    shape, num_tokens = read_model_shape(SHAPES[name], name), 200
    passes, there = make_passes(cuda, shape, rank, is_4bit, 512)
    with LiveBytes(*there) as counted:
        tokens = cuda.passes.Tokens(
            ids=torch.zeros(num_tokens, dtype=torch.int64),
            positions=torch.arange(num_tokens, dtype=torch.int32),
            slots=torch.zeros(num_tokens, dtype=torch.int32),
            stretches=((0, 0, num_tokens),),
        )
        wanted = torch.tensor([num_tokens - 1])
        counted.restart_peak()
        passes.read(tokens, wanted)
    found = counted.peak_bytes  # with the index of the wanted token, which is not on the tape
    assert pass_bytes(shape, PromptPass(num_tokens, num_tokens, rank, is_4bit)) == pytest.approx(found, abs=1024)


def test_the_decoder_has_these_limits(repository: Path) -> None:
    folder = repository / "dsft" / "infer" / "decoding" / "cuda"
    found = {}
    for name in ("decoder.py", "products.py", "weights.py", "../make.py"):
        for node in ast.parse((folder / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = ast.unparse(node.value)
    assert eval(found["FAMILIES"]) == generation.DECODED_FAMILIES
    assert eval(found["_HEAD_SIZES"]) == generation.DECODED_HEAD_SIZES
    assert int(found["_BLOCK"]) == generation.DECODED_MULTIPLE
    assert eval(found["_AMPERE"]) == generation.AMPERE
    assert int(found["_CAPACITY_STEP"]) == generation.CAPACITY_STEP
    assert int(found["_MAX_PASS_TOKENS"]) == prompt_pass.MAX_PASS_TOKENS
    assert int(found["MAX_FEW_TOKENS"]) == prompt_pass.MAX_FEW_TOKENS


def test_ranks_are_padded_as_the_decoder_pads_them(cuda: SimpleNamespace) -> None:
    assert [pad_rank(rank) for rank in (1, 8, 16, 17, 48, 64)] == [16, 16, 16, 32, 64, 64]
    assert all(pad_rank(rank) == cuda.products.pad_rank(rank) for rank in range(1, 300))


def test_the_largest_moment_of_the_model_is_in_the_mlp() -> None:
    hidden, inner, tokens = 4096, 11008, 1000
    few = 16 * tokens + 2048  # token ids, positions, places, and rounding
    written_out = 2 * tokens * (4 * hidden + 3 * inner) + 4 * inner * hidden
    assert prompt_bytes(SHAPE, 0, tokens, is_4bit=True) == pytest.approx(written_out + 16 * tokens, abs=few)
    gating = 2 * tokens * (4 * hidden + 4 * inner)
    assert prompt_bytes(SHAPE, 0, tokens, is_4bit=False) == pytest.approx(gating + 16 * tokens, abs=few)


# Peaks of PyTorch's allocator on an H200 less what it held before an answer and less cache, cosines and sines.
@pytest.mark.parametrize(
    ("is_4bit", "num_tokens", "measured_mib"),
    [(True, 1000, 267.55), (True, 4000, 549.7), (True, 8000, 558.0), (True, 4096, 558.05), (False, 128, 14.75),
     (False, 1000, 115.25), (False, 8000, 472.1), (False, 4096, 472.05)],
)  # fmt: skip
def test_passes_measured_on_a_gpu(is_4bit: bool, num_tokens: int, measured_mib: float) -> None:
    predicted = prompt_bytes(SHAPE, 0, num_tokens, is_4bit=is_4bit)
    assert predicted == pytest.approx(measured_mib * MIB, rel=0.006)


def test_long_prompts_are_read_in_passes_and_short_ones_count_as_the_trial() -> None:
    def read(num_tokens: int) -> int:
        return prompt_bytes(SHAPE, 8, num_tokens, is_4bit=True)

    assert read(4096) == read(8192) == read(10_000)
    assert read(1) == read(65) < read(66)
    assert read(4095) < read(4096)


def test_grouped_heads_repeat_all_keys_that_were_read() -> None:
    grouped = replace(SHAPE, num_kv_heads=8)
    size = PromptPass(num_tokens=4096, num_keys=4096, rank=0, is_4bit=False)
    assert pass_bytes(grouped, size) == pass_bytes(grouped, replace(size, num_keys=5000))  # the MLP takes more
    longer, longest = (pass_bytes(grouped, replace(size, num_keys=count)) for count in (40_000, 50_000))
    assert longest - longer == 2 * in_blocks(2 * 10_000 * 4096)
    assert pass_bytes(SHAPE, size) == pass_bytes(SHAPE, replace(size, num_keys=50_000))
