"""The written-down lives of tensors against those in real blocks: NF4 layers, PEFT's LoRA, autocast, recomputation.

On a CPU, so with these differences to a GPU: bitsandbytes multiplies by 4-bit weights without a 16-bit copy of them,
which is why the weights are small here and the tokens many; and the flash kernel is replaced by a stand-in that
allocates what the kernel does.
"""

import functools
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsft.core.data.samples import Sample
from dsft.core.memory.cards import H100
from dsft.core.memory.model_shape import in_blocks, read_model_shape
from dsft.core.memory.plain_path import PassSize, block_backward, block_forward, recomputed_backward, recomputed_forward
from dsft.core.memory.training import Group, TrainingLoad, estimate_training
from dsft.core.models.attention import PER_SAMPLE, VARLEN, AttentionKernel
from dsft.core.models.device import Device
from dsft.core.models.load import LoraSettings, attach_lora, load_quantized, recompute_blocks
from dsft.core.models.source import find_model
from dsft.train.batches import flatten
from dsft.train.loss import sum_target_losses
from tests.unit.core.memory.live_bytes import LiveBytes, storages_of

TOKENS, RANK, HIDDEN, SAMPLES = 1024, 8, 64, 4
CLOSE = 0.003
"""Share by which a real pass may differ: sums of a value for a token, which are not written down."""


@dataclass(frozen=True)
class Case:
    family: str
    kv_heads: int = 4
    head_dim: int = 16
    is_flash: bool = False
    precision: str = "bf16"
    inner: int = 192
    dropout: float = 0.0

    @property
    def size(self) -> PassSize:
        width = 2 if self.precision == "bf16" else 4
        return PassSize(TOKENS, TOKENS, RANK, width, self.is_flash, self.dropout > 0)

    def __str__(self) -> str:
        flash = "-flash" if self.is_flash else ""
        return f"{self.family}-{self.kv_heads}-heads-of-{self.head_dim}-mlp-of-{self.inner}-{self.precision}{flash}"


# starcoder2 is here in float32 only: its LayerNorm computes in float32 under a GPU's autocast, not under a CPU's.
CASES = [
    *(Case(family, is_flash=flash) for family in ("llama", "olmo2", "phi3") for flash in (False, True)),
    *(Case(family, 2, is_flash=flash) for family in ("llama", "qwen2", "phi3") for flash in (False, True)),
    *(Case("qwen3", heads, 32, is_flash=flash) for heads in (2, 4) for flash in (False, True)),
    *(Case(family, 1) for family in ("mistral", "granite", "smollm3")),
    *(Case(family, 2, precision="fp32") for family in ("llama", "qwen3", "olmo2", "phi3", "starcoder2")),
]
# Heads so wide that attention decides the peak of the backward pass, which no published model has.
WIDE = [
    Case("llama", 2, 128, is_flash=True, inner=32),
    *(Case("llama", 4, 128, is_flash=flash, inner=32) for flash in (False, True)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class _FlashStandIn(torch.autograd.Function):
    """Allocates and keeps what the kernel does; its values mean nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.ones(query.shape, dtype=query.dtype)
        log_sums = torch.zeros(query.shape[1], query.shape[0])
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        gradients = tuple(torch.zeros(part.shape, dtype=part.dtype) for part in (query, key, value))
        torch.zeros(query.shape[0] + 128, *query.shape[1:])  # the queries' gradient is summed in float32, padded
        return gradients[0], gradients[1], gradients[2]


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
    from torch.nn.attention import varlen

    @functools.wraps(varlen.varlen_attn)  # with its signature, which tells how it is called
    def stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        return _FlashStandIn.apply(query, key, value)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    # PEFT asks for the GPU's autocast; without it, it would turn the inputs of all adapters into float32.
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": is_enabled(kind))


class Setup:
    """A quantized model with LoRA, its shape, and what its blocks are called with."""

    def __init__(self, case: Case, folder: Path, num_blocks: int = 1, vocab_size: int = 99) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            case.family,
            hidden_size=HIDDEN,
            intermediate_size=case.inner,
            num_hidden_layers=num_blocks,
            num_attention_heads=4,
            num_key_value_heads=case.kv_heads,
            head_dim=case.head_dim,
            vocab_size=vocab_size,
            max_position_embeddings=TOKENS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        attention = AttentionKernel(VARLEN if case.is_flash else PER_SAMPLE, "")
        base = load_quantized(find_model(str(folder)), Device("cpu", "CPU"), case.precision, attention)  # type: ignore[arg-type]
        self.case = case
        self.shape = read_model_shape(json.loads((folder / "config.json").read_text()), "m")
        self.model = attach_lora(base, LoraSettings(RANK, 16, case.dropout, seed=1)).train()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # as in every step but the first micro-batch's
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        self.inputs = torch.randn(1, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
        self.bounds = torch.arange(0, TOKENS + 1, TOKENS // SAMPLES, dtype=torch.int32)
        decoder = base.model
        self.block = decoder.layers[-1]
        positions = torch.arange(TOKENS)[None]
        self.rotation = decoder.rotary_emb(self.inputs, positions)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.case.precision == "fp32":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    def run_block(self) -> torch.Tensor:
        with self.autocast():
            output: torch.Tensor = self.block(
                self.inputs,
                position_embeddings=self.rotation,
                cu_seq_lens_q=self.bounds,
                max_length_q=TOKENS // SAMPLES,
            )
        return output

    def watch(self) -> LiveBytes:
        live = LiveBytes(*storages_of(self.model), *self.rotation, self.bounds)
        live.count(self.inputs)
        live.restart_peak()
        return live

    def saved_bytes(self) -> tuple[int, bool]:
        """Run the block; return the bytes it keeps for the backward pass, and whether its input is among them."""
        known = {tensor.untyped_storage()._cdata for tensor in (*storages_of(self.model), *self.rotation, self.bounds)}
        saved: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.run_block()
        total = sum(in_blocks(storage.nbytes()) for storage in saved.values())
        return total, self.inputs.untyped_storage()._cdata in saved


@each_case
def test_a_block_keeps_what_is_written_down(case: Case, tmp_path: Path) -> None:
    setup = Setup(case, tmp_path)
    kept, _ = setup.saved_bytes()
    assert block_forward(setup.shape, case.size).kept_bytes == pytest.approx(kept, rel=CLOSE)


@pytest.mark.parametrize("family", ["llama", "olmo2", "phi3"])
@pytest.mark.parametrize("is_flash", [True, False])
def test_dropout_keeps_the_inputs_of_every_layer_and_their_masks(family: str, is_flash: bool, tmp_path: Path) -> None:
    case = Case(family, is_flash=is_flash, dropout=0.1)
    setup = Setup(case, tmp_path)
    kept, _ = setup.saved_bytes()
    # A GPU keeps a mask of bytes; a CPU keeps factors in the compute type.
    inputs = sum(linear.num_inputs for linear in setup.shape.block_linears)
    expected = block_forward(setup.shape, case.size).kept_bytes + TOKENS * inputs
    assert expected == pytest.approx(kept, rel=CLOSE)


@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=str)
def test_the_peaks_of_a_block_are_those_written_down(case: Case, tmp_path: Path) -> None:
    setup = Setup(case, tmp_path)
    _, keeps_input = setup.saved_bytes()
    state = in_blocks(setup.inputs.untyped_storage().nbytes())
    forward, backward = block_forward(setup.shape, case.size), block_backward(setup.shape, case.size)
    live = setup.watch()
    with live:
        output = setup.run_block()
    assert live.peak_bytes - state == pytest.approx(forward.peak_bytes, rel=CLOSE)
    live.restart_peak()
    with live:
        _End.apply(output).backward()
    # This test holds the block's input and output; the arithmetic's block holds its input where it keeps it.
    held = state + (0 if keeps_input else state)
    assert live.peak_bytes - held == pytest.approx(forward.kept_bytes + backward.peak_bytes, rel=CLOSE)
    assert backward.kept_bytes == -forward.kept_bytes


@each_case
def test_the_peaks_of_a_block_that_recomputes_are_those_written_down(case: Case, tmp_path: Path) -> None:
    setup = Setup(case, tmp_path)
    recompute_blocks(setup.model, 1)
    state = in_blocks(setup.inputs.untyped_storage().nbytes())
    live = setup.watch()
    with live:
        output = setup.run_block()
    forward = recomputed_forward(setup.shape, case.size)
    assert live.peak_bytes - state == pytest.approx(forward.peak_bytes, rel=0.01)
    assert live.live_bytes - state == pytest.approx(forward.kept_bytes, rel=CLOSE)  # its output: the next one's input
    live.restart_peak()
    with live:
        _End.apply(output).backward()
    held = 3 * state  # input, output and the gradient that comes in
    assert live.peak_bytes - held == pytest.approx(recomputed_backward(setup.shape, case.size).peak_bytes, rel=CLOSE)


def run_step(setup: Setup, num_recomputed: int) -> tuple[LiveBytes, TrainingLoad]:
    """Run a micro-batch forward and backward; return what was alive, and what it is to be estimated from."""
    recompute_blocks(setup.model, num_recomputed)
    length = TOKENS // SAMPLES
    batch = flatten([Sample(np.full(length, 7), np.ones(length, dtype=bool), row) for row in range(SAMPLES)])
    live = LiveBytes(*storages_of(setup.model), *(v for v in vars(batch).values() if isinstance(v, torch.Tensor)))
    with live:
        with setup.autocast():
            loss = sum_target_losses(setup.model, batch)
        loss.backward()
    load = TrainingLoad(
        setup.shape,
        RANK,
        TOKENS,
        batch.num_targets,
        value_bytes=setup.case.size.value_bytes,
        is_flash=setup.case.is_flash,
        num_recomputed=num_recomputed,
    )
    return live, load


@pytest.mark.parametrize("num_recomputed", [0, 1, 3])
@pytest.mark.parametrize("vocab_size", [99, 6000], ids=["blocks-decide", "loss-decides"])
@pytest.mark.parametrize(
    "case",
    [
        Case("llama", 2, is_flash=True),
        Case("llama", 2),
        Case("qwen3", 1, 32, is_flash=True),
        Case("granite", is_flash=True),
    ],
    ids=str,
)
def test_the_peak_of_a_step_is_the_estimate(case: Case, vocab_size: int, num_recomputed: int, tmp_path: Path) -> None:
    live, load = run_step(Setup(case, tmp_path, num_blocks=3, vocab_size=vocab_size), num_recomputed)
    memory = estimate_training(load, H100)
    estimated = sum(term.num_bytes for term in memory.terms if term.group == Group.ACTIVATIONS)
    assert estimated == pytest.approx(live.peak_bytes, rel=CLOSE)
    assert (memory.peak_moment == "the loss") == (vocab_size == 6000 or num_recomputed < 3)


@pytest.mark.parametrize("num_recomputed", range(4))
def test_the_peak_of_a_step_whose_blocks_decide(num_recomputed: int, tmp_path: Path) -> None:
    setup = Setup(Case("llama", 2, is_flash=True, inner=512), tmp_path, num_blocks=3)
    live, load = run_step(setup, num_recomputed)
    memory = estimate_training(load, H100)
    estimated = sum(term.num_bytes for term in memory.terms if term.group == Group.ACTIVATIONS)
    assert estimated == pytest.approx(live.peak_bytes, rel=CLOSE)
    assert "backward pass" in memory.peak_moment
