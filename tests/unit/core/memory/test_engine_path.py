"""The written-down lives of the engine's tensors against those in its real blocks, and what is constant on its path.

On a CPU, where stand-ins take the places of the kernels: they allocate what those do, and their values mean nothing.
"""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsft.core.data.samples import Sample
from dsft.core.engine import attention, elementwise, projection
from dsft.core.engine.nf4_weight import Nf4Weight
from dsft.core.memory.block_path import ENGINE_PATH, PLAIN_PATH
from dsft.core.memory.cards import H100
from dsft.core.memory.engine_backward import begin_gradient, reverse_block
from dsft.core.memory.engine_forward import run_block
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, ModelShape, in_blocks, read_model_shape
from dsft.core.memory.pass_size import PassSize
from dsft.core.memory.tape import Tape
from dsft.core.memory.training import Group, TrainingLoad, TrainingMemory, estimate_training, lora_bytes
from dsft.core.models.attention import VARLEN
from dsft.core.models.device import Device
from dsft.train.batches import flatten
from dsft.train.loss import sum_target_losses
from tests.engine_models import load_pair, write_model
from tests.unit.core.memory.live_bytes import LiveBytes, storages_of

LENGTHS = (100, 300, 300, 324)
TOKENS, RANK = sum(LENGTHS), 8
CLOSE = 0.002
"""Share by which a real pass may differ: counters and sums of a sample."""

CONFIG = BUILTIN_CONFIGS["deepseek-ai/deepseek-coder-6.7b-base"]
LARGE = read_model_shape(CONFIG, "6.7b")
GROUPED = read_model_shape(CONFIG | {"num_key_value_heads": 8, "intermediate_size": 14_336}, "grouped")
NORMED = read_model_shape(CONFIG | {"model_type": "qwen3", "head_dim": 128}, "with norms of heads")


@dataclass(frozen=True)
class Case:
    kind: str
    precision: str = "bf16"
    inner: int = 192

    @property
    def size(self) -> PassSize:
        return PassSize(TOKENS, TOKENS, RANK, 2 if self.precision == "bf16" else 4)

    def __str__(self) -> str:
        return f"{self.kind}-{self.precision}-mlp-of-{self.inner}"


KINDS = ["llama", "llama-with-all-heads", "llama-with-biases", "mistral", "qwen2", "qwen3"]
# With a narrow MLP attention decides the peaks, as in no published model.
CASES = [Case(kind, inner=inner) for kind in KINDS for inner in (64, 512)]
CASES += [Case(kind, "fp32") for kind in ("llama", "qwen3")]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class _FlashStandIn:
    """Allocates and keeps what the kernel does."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> None:
        self._inputs = (query, key, value)
        self.output = torch.ones(query.shape, dtype=query.dtype)
        self._log_sums = torch.zeros(query.shape[1], query.shape[0])

    def reverse(self, _gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, _ = self._inputs
        gradients = tuple(torch.zeros(part.shape, dtype=part.dtype) for part in self._inputs)
        taken = [torch.zeros(query.shape[0] + 128, *query.shape[1:])]  # the queries' gradient, in float32 and padded
        if key.shape[1] < query.shape[1]:  # those of keys and values, for each query head
            taken += [torch.zeros(query.shape, dtype=query.dtype) for _ in range(2)]
        del self._log_sums
        return gradients


class _End(torch.autograd.Function):
    """What follows a block: its gradient belongs to the backward pass alone, which frees it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.like = (output.shape, output.dtype)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> torch.Tensor:
        shape, dtype = ctx.like
        return torch.ones(shape, dtype=dtype)


@pytest.fixture(autouse=True)
def _like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def roots(states: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.ones(states.shape[:-1].numel())

    def losses(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.ones(len(labels))

    def nothing(*_: Any, **__: Any) -> None:
        pass

    monkeypatch.setattr(attention, "_SavedVarlen", _FlashStandIn)
    monkeypatch.setattr(elementwise, "normalize", roots)
    monkeypatch.setattr("dsft.train.loss.cross_entropy", losses)
    for name in ("normalize_backward", "rotate", "rotate_back", "gate", "gate_backward"):
        monkeypatch.setattr(elementwise, name, nothing)
    monkeypatch.setattr(projection, "add_product", nothing)
    for name in ("dequantize", "dequantize_beside", "dequantize_above"):
        monkeypatch.setattr(Nf4Weight, name, nothing)


class Setup:
    """A model under the engine, its shape, and what its blocks are called with."""

    def __init__(self, case: Case, folder: Path, num_blocks: int = 1, vocab_size: int = 160) -> None:
        write_model(
            case.kind, folder, num_hidden_layers=num_blocks, intermediate_size=case.inner, vocab_size=vocab_size
        )
        _, self.model, self.engine = load_pair(folder, Device("cpu", "CPU"), case.precision, VARLEN, rank=RANK)  # type: ignore[arg-type]
        self.case = case
        self.shape = read_model_shape(json.loads((folder / "config.json").read_text()), "m")
        decoder = self.model.get_base_model().model
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        self.inputs = torch.ones(1, TOKENS, self.shape.hidden_size, dtype=dtype, requires_grad=True)
        self.bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
        self.block = decoder.layers[-1]
        self.rotation = decoder.rotary_emb(self.inputs, torch.arange(TOKENS)[None])

    @property
    def constant(self) -> list[torch.Tensor]:
        """What is there all the time."""
        lora = self.engine.lora
        workspace = self.block.attention.inputs._workspace._values
        return [*storages_of(self.model), lora.parameter, lora.gradients, lora.copy, workspace]

    def run_block(self) -> torch.Tensor:
        output: torch.Tensor = self.block(
            self.inputs,
            position_embeddings=self.rotation,
            cu_seq_lens_q=self.bounds,
            max_length_q=max(LENGTHS),
        )
        return output

    def watch(self) -> LiveBytes:
        live = LiveBytes(*self.constant, *self.rotation, self.bounds)
        live.count(self.inputs)
        live.restart_peak()
        return live


@each_case
def test_a_block_takes_and_keeps_what_is_written_down(case: Case, tmp_path: Path) -> None:
    setup = Setup(case, tmp_path)
    state = in_blocks(setup.inputs.untyped_storage().nbytes())
    forward, backward = (
        ENGINE_PATH.block_forward(setup.shape, case.size),
        ENGINE_PATH.block_backward(setup.shape, case.size),
    )
    live = setup.watch()
    with live:
        output = setup.run_block()
    assert live.peak_bytes - state == pytest.approx(forward.peak_bytes, rel=CLOSE)
    assert live.live_bytes - state == pytest.approx(forward.kept_bytes, rel=CLOSE)  # its output in place of its input
    live.restart_peak()
    with live:
        _End.apply(output).backward()
    # This test holds the block's output beside what the block kept.
    assert live.peak_bytes - state == pytest.approx(forward.kept_bytes + backward.peak_bytes, rel=CLOSE)
    assert backward.kept_bytes == -forward.kept_bytes


@each_case
def test_a_block_that_recomputes_takes_what_is_written_down(case: Case, tmp_path: Path) -> None:
    setup = Setup(case, tmp_path)
    setup.engine.recompute(1)
    state = in_blocks(setup.inputs.untyped_storage().nbytes())
    forward = ENGINE_PATH.recomputed_forward(setup.shape, case.size)
    live = setup.watch()
    with live:
        output = setup.run_block()
    assert live.peak_bytes - state == pytest.approx(forward.peak_bytes, rel=CLOSE)
    assert live.live_bytes - state == pytest.approx(forward.kept_bytes, rel=CLOSE)
    live.restart_peak()
    with live:
        _End.apply(output).backward()
    # Input, output and, as for the last block, a gradient that comes in without columns to spare.
    peak = 3 * state + ENGINE_PATH.recomputed_backward(setup.shape, case.size).peak_bytes + state
    assert live.peak_bytes == pytest.approx(peak, rel=CLOSE)


def run_step(setup: Setup, num_recomputed: int) -> tuple[LiveBytes, TrainingLoad]:
    """Run a micro-batch forward and backward; return what was alive, and what it is to be estimated from."""
    setup.engine.recompute(num_recomputed)
    samples = [Sample(np.full(n, 7), np.ones(n, dtype=bool), row) for row, n in enumerate(LENGTHS)]
    batch = flatten(samples)
    live = LiveBytes(*setup.constant, *(v for v in vars(batch).values() if isinstance(v, torch.Tensor)))
    with live:
        sum_target_losses(setup.model, batch, is_fused=True).backward()
    load = TrainingLoad(
        setup.shape,
        RANK,
        TOKENS,
        batch.num_targets,
        value_bytes=setup.case.size.value_bytes,
        num_recomputed=num_recomputed,
        uses_engine=True,
    )
    return live, load


def activation_bytes(memory: TrainingMemory) -> int:
    return sum(term.num_bytes for term in memory.terms if term.group == Group.ACTIVATIONS)


@pytest.mark.parametrize("num_recomputed", range(4))
@pytest.mark.parametrize("vocab_size", [160, 6000], ids=["blocks-decide", "loss-decides"])
@pytest.mark.parametrize("case", [Case("llama"), Case("qwen3"), Case("qwen2", "fp32")], ids=str)
def test_the_peak_of_a_step_is_the_estimate(case: Case, vocab_size: int, num_recomputed: int, tmp_path: Path) -> None:
    live, load = run_step(Setup(case, tmp_path, num_blocks=3, vocab_size=vocab_size), num_recomputed)
    memory = estimate_training(load, H100)
    estimated = activation_bytes(memory)
    assert estimated == pytest.approx(live.peak_bytes, rel=CLOSE)
    assert (memory.peak_moment == "the loss") == (vocab_size == 6000)


@pytest.mark.parametrize(
    "case", [Case("llama"), Case("qwen2"), Case("llama-with-biases"), Case("qwen3", "fp32")], ids=str
)
def test_what_is_constant_is_what_an_engine_holds(case: Case, tmp_path: Path) -> None:
    setup = Setup(case, tmp_path, num_blocks=2)
    lora, width = setup.engine.lora, case.size.value_bytes
    load = TrainingLoad(setup.shape, RANK, TOKENS, TOKENS, value_bytes=width, uses_engine=True)
    terms = {term.name: term.num_bytes for term in estimate_training(load, H100).terms}
    assert terms["LoRA weights"] == terms["LoRA gradients"] == lora.parameter.untyped_storage().nbytes()
    assert terms.get("LoRA weights, 16-bit copy", 0) == (lora.copy.untyped_storage().nbytes() if lora.has_copy else 0)
    workspace = setup.block.attention.inputs._workspace._values
    assert terms["dequantization workspace"] == in_blocks(workspace.untyped_storage().nbytes())
    halves = [half for block in setup.engine.blocks for half in (block.attention, block.mlp_half)]
    parts = [part for half in halves for part in (half.inputs, half.output)]
    biases = [part.bias for part in parts if part.bias is not None]
    # On a CPU each layer's offsets are alone; on a GPU, rounded to 512 bytes together, those of several layers.
    offsets = [weight.group_offsets for part in parts for weight in part._weights]
    held = sum(in_blocks(tensor.untyped_storage().nbytes()) for tensor in (*biases, *offsets))
    assert held - 512 * len(offsets) < terms["engine's tables"] <= held
    assert bool(biases) == (case.kind in ("qwen2", "llama-with-biases"))


# Sizes of real models


def load_of(shape: ModelShape, **settings: Any) -> TrainingLoad:
    load = TrainingLoad(shape, 64, 4096, 4096, uses_engine=True)
    return replace(load, **settings)


def test_what_a_block_keeps() -> None:
    # Two inputs, q, k, v and what attention gives 6h, gate and up, seven products of rank 64; in float32 a number for
    # each norm and each head.
    token = 2 * (6 * 4096 + 2 * 11_008 + 7 * 64) + 4 * (2 + 32)
    assert ENGINE_PATH.block_forward(LARGE, PassSize(4096, 4096, 64)).kept_bytes == 4096 * token
    plain = PLAIN_PATH.block_forward(LARGE, PassSize(4096, 4096, 64)).kept_bytes
    assert 4096 * token < 0.55 * plain


def test_the_constant_terms_of_the_large_model() -> None:
    terms = {term.name: term for term in estimate_training(load_of(LARGE), H100).terms}
    # Gate and up with A's product beside them are the largest matrix: 22,016 x (4,096 + 128).
    assert terms["dequantization workspace"].num_bytes == 2 * 22_016 * 4_224
    assert terms["dequantization workspace"].group == Group.OVERHEAD
    assert terms["LoRA weights, 16-bit copy"].num_bytes == 2 * 159_907_840 == lora_bytes(LARGE, 64) // 2
    # A float32 for 256 x 64 weights; down's 11,008 bytes are not whole units of 512.
    assert terms["engine's tables"].num_bytes == 4 * 6_476_005_376 // 16_384 + 32 * 256
    plain = estimate_training(load_of(LARGE, uses_engine=False), H100)
    assert not {"dequantization workspace", "LoRA weights, 16-bit copy"} & {term.name for term in plain.terms}
    assert plain.allocated_bytes > estimate_training(load_of(LARGE), H100).allocated_bytes


@pytest.mark.parametrize("shape", [LARGE, GROUPED, NORMED], ids=["6.7b", "grouped", "normed"])
@pytest.mark.parametrize("is_flash", [True, False])
def test_memory_grows_with_tokens_and_rank_and_shrinks_with_blocks_that_recompute(
    shape: ModelShape, is_flash: bool
) -> None:
    base = load_of(shape, is_flash=is_flash)
    for loads in (
        [replace(base, num_tokens=n, num_targets=n) for n in (64, 512, 4096, 16_384)],
        [replace(base, num_targets=n) for n in (64, 512, 4096)],
        [replace(base, rank=n) for n in (8, 16, 64, 256)],
        # With all blocks the last one's input stays too, while its forward pass runs again.
        [replace(base, num_recomputed=31 - n) for n in range(32)],
        [replace(base, num_validation_tokens=n) for n in (0, 4096, 65_536, 200_000)],
        [replace(base, value_bytes=n) for n in (2, 4)],
    ):
        needed = [estimate_training(load, H100).reserved_bytes for load in loads]
        for before, after in itertools.pairwise(needed):
            assert before <= after
        assert needed[0] <= needed[-1]
    most, least = (estimate_training(replace(base, num_recomputed=n), H100) for n in (0, 32))
    assert least.allocated_bytes < most.allocated_bytes / 2


@pytest.mark.parametrize("shape", [LARGE, GROUPED, NORMED], ids=["6.7b", "grouped", "normed"])
@pytest.mark.parametrize("is_flash", [True, False])
def test_a_backward_pass_frees_all_that_the_forward_pass_kept(shape: ModelShape, is_flash: bool) -> None:
    size, tape = PassSize(512, 512, 16, is_flash=is_flash), Tape()
    tape.make("incoming gradient", 1)
    run_block(tape, shape, size)
    tape.drop("output")
    begin_gradient(tape, shape, size)
    reverse_block(tape, shape, size)
    assert tape.alive() == {}
