"""The engine in a model: losses and LoRA's gradients are those of transformers' and PEFT's own modules."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.core.models.device import Device
from dsft.train.batches import MicroBatch, flatten
from dsft.train.loss import sum_target_losses
from tests.engine_models import KINDS, load_pair, write_model
from tests.unit.train.random_samples import make_samples

CPU = Device("cpu", "CPU")


def make_batch() -> MicroBatch:
    data = make_samples(4)
    return flatten([data[index] for index in range(4)])


def named_gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def run_plain(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    loss = sum_target_losses(model, batch)
    loss.backward()
    return loss.detach(), named_gradients(model)


@pytest.fixture(params=sorted(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Any]:
    write_model(request.param, tmp_path)
    return load_pair(tmp_path, CPU)


@pytest.mark.parametrize("num_recomputed", [0, 2])
def test_loss_and_gradients_are_those_of_the_plain_path(pair: tuple[Any, Any, Any], num_recomputed: int) -> None:
    plain, other, engine = pair
    batch = make_batch()
    expected_loss, expected = run_plain(plain, batch)
    engine.recompute(num_recomputed)
    engine.lora.clear_gradients()
    loss, gradients = run_plain(other, batch)
    assert gradients.keys() == expected.keys()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, (name, error.item())


def test_gradients_of_two_micro_batches_add_up(pair: tuple[Any, Any, Any]) -> None:
    _plain, other, engine = pair
    batch = make_batch()
    _, once = run_plain(other, batch)
    engine.lora.clear_gradients()
    run_plain(other, batch)
    _, twice = run_plain(other, batch)
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], 2 * gradient, rtol=1e-5, atol=1e-6)


def test_names_and_values_of_an_adapter_stay(pair: tuple[Any, Any, Any]) -> None:
    from peft import get_peft_model_state_dict

    plain, other, _ = pair
    expected, found = get_peft_model_state_dict(plain), get_peft_model_state_dict(other)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(other.state_dict()) == set(plain.state_dict())
