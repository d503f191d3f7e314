"""The engine on a GPU: its kernels against PyTorch's operations, its gradients against a float32 reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.core.engine import elementwise
from dsft.core.engine.nf4_weight import Nf4Weight
from dsft.core.models.attention import PER_SAMPLE, VARLEN
from dsft.core.models.device import resolve_device
from dsft.train.batches import MicroBatch, flatten
from dsft.train.loss import sum_target_losses
from tests.engine_models import KINDS, load_pair, write_model
from tests.unit.train.random_samples import make_samples

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.float().cpu() - expected.float()).norm() / expected.float().norm()
    assert error < TOLERANCE[dtype], error.item()


def wide(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns of a wider buffer, as the engine has them."""
    return torch.randn(tokens, columns + 24).to(dtype)[:, :columns]


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the GPU, of the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (37, 4096), (5, 100), (300, 128)])
def test_norm_and_its_gradient(dtype: torch.dtype, tokens: int, width: int) -> None:
    torch.manual_seed(0)
    states, gradient, stream = (wide(tokens, width, dtype) for _ in range(3))
    weight = (1 + 0.2 * torch.randn(width)).to(dtype)
    for out, again in ((wide(tokens, width, dtype), wide(tokens, width, dtype)),):
        rstd = elementwise.normalize(states, weight, 1e-6, out)
        gpu_out = on_gpu(out)
        gpu_rstd = elementwise.normalize(on_gpu(states), weight.cuda(), 1e-6, gpu_out)
        assert_close(gpu_out, out, dtype)
        assert_close(gpu_rstd, rstd, torch.float32)
        for adds in (True, False):
            gpu_stream, gpu_again = on_gpu(stream), on_gpu(again)
            elementwise.normalize_backward(gradient, states, weight, rstd, stream, adds=adds, normalized=again)
            elementwise.normalize_backward(
                on_gpu(gradient), on_gpu(states), weight.cuda(), gpu_rstd, gpu_stream, adds=adds, normalized=gpu_again
            )
            assert_close(gpu_stream, stream, dtype)
            assert_close(gpu_again, again, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (40, 128), (1, 16)])
def test_rotation(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    states = wide(29, heads * head_dim, dtype).view(29, heads, head_dim)
    angles = torch.randn(29, head_dim)
    cosines, sines = angles.cos().to(dtype)[:, : head_dim // 2], angles.sin().to(dtype)[:, : head_dim // 2]
    out, in_place = torch.empty_like(states), on_gpu(states)
    elementwise.rotate(states, cosines, sines, out)
    elementwise.rotate(in_place, on_gpu(cosines), on_gpu(sines), in_place)
    assert_close(in_place, out, dtype)
    values = wide(29, heads * head_dim, dtype).view(29, heads, head_dim)
    beside = torch.empty(29, 3 * heads, head_dim, dtype=dtype)
    gpu_beside = on_gpu(beside)
    elementwise.rotate_back(out, states, values, cosines, sines, beside)
    gpu_tables = on_gpu(cosines), on_gpu(sines)
    elementwise.rotate_back(in_place, on_gpu(states), on_gpu(values), *gpu_tables, gpu_beside)
    assert_close(gpu_beside, beside, dtype)
    assert_close(gpu_beside[:, :heads], states, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 1000, 11008])
def test_gate_and_its_gradient(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    gate_up, gradient = wide(33, 2 * width, dtype), wide(33, width, dtype)
    out, at_gate_up, again = wide(33, width, dtype), wide(33, 2 * width, dtype), wide(33, width, dtype)
    gpu_out, gpu_at_gate_up, gpu_gradient = on_gpu(out), on_gpu(at_gate_up), on_gpu(gradient)
    elementwise.gate(gate_up, out)
    elementwise.gate(on_gpu(gate_up), gpu_out)
    assert_close(gpu_out, out, dtype)
    elementwise.gate_backward(gate_up, gradient, at_gate_up, again)
    elementwise.gate_backward(on_gpu(gate_up), gpu_gradient, gpu_at_gate_up, gpu_gradient)
    assert_close(gpu_at_gate_up, at_gate_up, dtype)
    assert_close(gpu_gradient, again, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [50, 4096, 32256])
def test_cross_entropy(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits, labels = (5 * torch.randn(19, vocabulary)).to(dtype), torch.randint(vocabulary, (19,))
    on_device = logits.cuda()
    losses = elementwise.cross_entropy(logits, labels, writes_gradient=True)
    assert_close(elementwise.cross_entropy(on_device, labels.cuda(), writes_gradient=True), losses, torch.float32)
    assert_close(on_device, logits, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_weights_are_those_of_bitsandbytes_bit_for_bit(dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    for outputs, inputs in ((64, 64), (100, 192), (4096, 11008)):
        layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
        layer.weight.data = 0.02 * torch.randn(outputs, inputs, dtype=dtype)
        layer = layer.cuda()
        buffer = torch.zeros(outputs, inputs + 16, dtype=dtype, device="cuda")
        Nf4Weight.of(layer).dequantize(buffer[:, :inputs])
        assert torch.equal(buffer[:, :inputs], dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        assert not buffer[:, inputs:].any()


def named_gradients(model: Any, batch: MicroBatch, *, is_fused: bool, autocast: bool) -> dict[str, torch.Tensor]:
    model.train()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
        loss = sum_target_losses(model, batch.to(torch.device("cuda")), is_fused=is_fused)
    loss.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return found | {"loss": loss.detach().cpu()}


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


def make_equal_batch() -> MicroBatch:
    """Samples of one length that cuDNN takes."""
    from dsft.bench.data import RandomSamples

    samples = RandomSamples(3, 256, 150, seed=1)
    return flatten([samples[index] for index in range(3)])


def make_batch() -> MicroBatch:
    data = make_samples(6)
    return flatten([data[index] for index in range(6)])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_float32_gradients_are_those_of_the_plain_path(kind: str, tmp_path: Path) -> None:
    write_model(kind, tmp_path)
    torch.backends.cuda.matmul.allow_tf32 = False
    plain, other, engine = load_pair(tmp_path, resolve_device("cuda"), "fp32", PER_SAMPLE)
    engine.lora.clear_gradients()
    expected = named_gradients(plain, make_batch(), is_fused=False, autocast=False)
    for name, error in relative_errors(
        named_gradients(other, make_batch(), is_fused=True, autocast=False), expected
    ).items():
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("rank", [1, 3])
def test_float32_gradients_of_odd_ranks(rank: int, tmp_path: Path) -> None:
    write_model("llama", tmp_path)
    plain, other, engine = load_pair(tmp_path, resolve_device("cuda"), "fp32", PER_SAMPLE, rank=rank, alpha=0.5)
    engine.lora.clear_gradients()
    expected = named_gradients(plain, make_batch(), is_fused=False, autocast=False)
    found = named_gradients(other, make_batch(), is_fused=True, autocast=False)
    for name, error in relative_errors(found, expected).items():
        assert error < 1e-5, (name, error)


def test_bf16_gradients_with_equally_long_samples(tmp_path: Path) -> None:
    """Where heads are not grouped, cuDNN computes attention on Hopper."""
    write_model("llama-with-all-heads", tmp_path, hidden_size=1024, num_attention_heads=8, num_key_value_heads=8)
    plain, other, engine = load_pair(tmp_path, resolve_device("cuda"), "bf16", VARLEN, rank=64, alpha=128)
    engine.lora.clear_gradients()
    batch = make_equal_batch()
    found = named_gradients(other, batch, is_fused=True, autocast=True)
    yardstick = named_gradients(plain, batch, is_fused=False, autocast=True)
    del plain, other, engine
    reference, _, _ = load_pair(tmp_path, resolve_device("cuda"), "fp32", PER_SAMPLE, rank=64, alpha=128)
    expected = named_gradients(reference, batch, is_fused=False, autocast=False)
    ours, theirs = relative_errors(found, expected), relative_errors(yardstick, expected)
    print("equal", sum(ours.values()) / len(ours), sum(theirs.values()) / len(theirs))
    assert sum(ours.values()) <= 1.1 * sum(theirs.values())


def test_the_engine_comes_and_goes_on_one_model(tmp_path: Path) -> None:
    from dsft.core.engine.install import install_engine

    write_model("llama", tmp_path)
    _, other, engine = load_pair(tmp_path, resolve_device("cuda"), "fp32", PER_SAMPLE)
    losses = []
    for is_engine in (True, False, True):
        if is_engine and losses:
            engine = install_engine(other, PER_SAMPLE, torch.float32)
        losses.append(named_gradients(other, make_batch(), is_fused=is_engine, autocast=False)["loss"])
        if is_engine:
            engine.remove()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("num_recomputed", [0, 2])
def test_bf16_gradients_are_no_further_off_than_the_plain_path_s(
    kind: str, num_recomputed: int, tmp_path: Path
) -> None:
    """Both against the plain path in float32 with the same bfloat16 weights."""
    write_model(kind, tmp_path, hidden_size=1024, intermediate_size=2816, num_attention_heads=8)
    plain, other, engine = load_pair(tmp_path, resolve_device("cuda"), "bf16", VARLEN, rank=64, alpha=128)
    engine.recompute(num_recomputed)
    engine.lora.clear_gradients()
    batch = make_batch()
    found = named_gradients(other, batch, is_fused=True, autocast=True)
    yardstick = named_gradients(plain, batch, is_fused=False, autocast=True)
    del plain, other, engine
    reference, _, _ = load_pair(tmp_path, resolve_device("cuda"), "fp32", PER_SAMPLE, rank=64, alpha=128)
    expected = named_gradients(reference, batch, is_fused=False, autocast=False)
    ours, theirs = relative_errors(found, expected), relative_errors(yardstick, expected)
    mean = {which: sum(errors.values()) / len(errors) for which, errors in (("ours", ours), ("plain", theirs))}
    print(kind, num_recomputed, mean, max(ours.values()), max(theirs.values()), ours["loss"], theirs["loss"])
    assert mean["ours"] <= 1.1 * mean["plain"]
    for name, error in ours.items():
        if name != "loss":
            assert error <= 1.1 * max(theirs[name], mean["plain"]), (name, error, theirs[name])
