"""A quantized copy on a CUDA device: the same model as quantizing there, without it running, and no more memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.core.models import nf4_cache, nf4_file
from dsft.core.models.device import Device
from dsft.core.models.nf4_model import load_nf4_model
from dsft.core.models.source import find_model
from dsft.core.paths import nf4_cache_dir
from tests.scripted_models import write_random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CARD = Device("cuda", "the first card")


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nf4_cache, "LEAST_COPY_BYTES", 0)
    return write_random_model(tmp_path / "model", hidden_size=512, intermediate_size=1408, num_hidden_layers=8)


def load(folder: Path) -> tuple[Any, list[str], int]:
    """Return the model, the notices, and the bytes that were allocated at most."""
    notices: list[str] = []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_nf4_model(find_model(str(folder)), CARD, torch.bfloat16, {}, notices.append)
    return model, notices, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("piece_bytes", [2**23, 10_000])
def test_a_copy_gives_the_model_that_quantizing_gives(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    import bitsandbytes

    monkeypatch.setattr(nf4_file, "_PIECE_BYTES", piece_bytes)
    fresh, [notice], fresh_peak_bytes = load(model_dir)
    assert notice.startswith("Kept a quantized copy")
    monkeypatch.delattr(bitsandbytes.functional, "quantize_4bit")
    read, notices, peak_bytes = load(model_dir)
    assert notices == []
    assert peak_bytes <= fresh_peak_bytes
    expected, found = (dict(model.named_buffers()) | model.state_dict() for model in (fresh, read))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (tensor.dtype, tensor.device) == (found[name].dtype, found[name].device), name
        assert torch.equal(tensor, found[name]), name
    for one, other in zip(fresh.modules(), read.modules(), strict=True):
        if hasattr(one, "quant_state"):
            assert one.quant_state.offset.device == other.quant_state.offset.device
            assert one.quant_state is one.weight.quant_state
            assert other.quant_state is other.weight.quant_state
    prompt = torch.arange(1, 60, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=prompt).logits, read(input_ids=prompt).logits)


def test_a_damaged_copy_is_made_anew_and_its_memory_is_free_again(model_dir: Path) -> None:
    _, _, peak_bytes = load(model_dir)
    [copy] = nf4_cache_dir().iterdir()
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    _, notices, peak_of_both_bytes = load(model_dir)
    assert "was damaged" in notices[0]
    assert peak_of_both_bytes < 1.1 * peak_bytes
