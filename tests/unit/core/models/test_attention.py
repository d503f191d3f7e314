"""The choice of kernel, and that the per-sample kernel is plain causal attention inside each sample."""

import pytest
import torch

from dsft.core.errors import ConfigError
from dsft.core.models import attention
from dsft.core.models.attention import PER_SAMPLE, VARLEN, attend_per_sample, attend_varlen, choose_attention
from dsft.core.models.device import Device

CPU = Device("cpu", "CPU")
AMPERE = Device("cuda", "NVIDIA GeForce RTX 4090", (8, 9))
TURING = Device("cuda", "Tesla T4", (7, 5))
BOUNDS = torch.tensor([0, 7, 8, 20, 33], dtype=torch.int32)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_per_sample_attention_is_masked_attention(num_kv_heads: int):
    torch.manual_seed(0)
    query = torch.randn(1, 4, 33, 8)
    key, value = torch.randn(2, 1, num_kv_heads, 33, 8)
    output, weights = attend_per_sample(None, query, key, value, None, cu_seq_lens_q=BOUNDS)
    sample_of = torch.repeat_interleave(torch.arange(4), BOUNDS.diff())
    mask = (sample_of[:, None] == sample_of[None]) & torch.ones(33, 33, dtype=torch.bool).tril()
    repeats = 4 // num_kv_heads
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(output, (scores.softmax(-1) @ value).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert weights is None


def test_without_the_flag_the_built_in_kernel_serves_silently():
    assert choose_attention(None, CPU, "fp32").name == PER_SAMPLE
    assert choose_attention(None, TURING, "fp16").name == PER_SAMPLE
    assert choose_attention(None, AMPERE, "fp32").name == PER_SAMPLE
    kernel = choose_attention(None, AMPERE, "bf16")
    assert (kernel.name, kernel.notice) == (VARLEN, None)


@pytest.mark.parametrize(
    ("device", "precision", "reason"),
    [(CPU, "fp32", "CPU"), (TURING, "fp16", "older than Ampere"), (AMPERE, "fp32", "16-bit")],
)
def test_a_demanded_flash_kernel_that_cannot_be_is_an_error(device: Device, precision, reason: str):
    with pytest.raises(ConfigError, match=reason):
        choose_attention("--use-flash-attention", device, precision)


def test_a_missing_flash_attn_package_is_said_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    kernel = choose_attention("--use-flash-attention", AMPERE, "bf16")
    assert kernel.name == VARLEN
    assert "flash-attn" in kernel.notice and "not installed" in kernel.notice


def test_a_broken_flash_attn_package_is_named_as_such(monkeypatch: pytest.MonkeyPatch):
    def fail(name: str):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention.importlib, "import_module", fail)
    kernel = choose_attention("--use-flash-attention", AMPERE, "bf16")
    assert kernel.name == VARLEN
    assert "broken (undefined symbol" in kernel.notice


def test_a_working_flash_attn_package_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention.importlib, "import_module", lambda name: object())
    kernel = choose_attention("--use-flash-attention", AMPERE, "bf16")
    assert (kernel.name, kernel.notice) == ("flash_attention_2", None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_the_varlen_kernel_agrees_with_the_per_sample_one(num_kv_heads: int):
    torch.manual_seed(0)
    shapes = [(1, heads, 33, 64) for heads in (4, num_kv_heads, num_kv_heads)]
    states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    bounds = BOUNDS.cuda()
    results = []
    for kernel in (attend_varlen, attend_per_sample):
        output, _ = kernel(None, *states, None, cu_seq_lens_q=bounds, max_length_q=13)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), states)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)
