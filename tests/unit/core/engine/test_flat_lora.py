"""Many weights in one tensor: views that stay views, runs that are one matrix, steps that change nothing else."""

import weakref

import numpy as np
import pytest
import torch

from dsft.core.engine.flat_lora import ALIGNMENT_VALUES, FlatLora

SHAPES = [(8, 48), (8, 48), (4, 48), (7, 3), (64, 8), (32, 8), (5,)]
"""Two runs that are matrices, and what stands alone among them."""


def make_weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def make_runs(weights: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    return [weights[:3], weights[3:4], weights[4:6], weights[6:]]


def loss_of(weights: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.stack([torch.sin(3 * weight).sum() for weight in weights]).sum()


def test_weights_keep_their_values_and_lie_in_one_tensor():
    weights = make_weights()
    before = [weight.detach().clone() for weight in weights]
    flat = FlatLora(make_runs(weights))
    for weight, value in zip(weights, before, strict=True):
        assert torch.equal(weight, value)
        assert weight.untyped_storage().data_ptr() == flat.parameter.untyped_storage().data_ptr()
        assert weight.is_leaf and weight.requires_grad
        assert torch.equal(flat.view_of(flat.parameter, weight), value)
    assert flat.parts == weights


def test_runs_are_aligned_and_have_no_gap_inside():
    weights = make_weights()
    FlatLora(make_runs(weights))
    offsets = [weight.storage_offset() for weight in weights]
    assert offsets == [0, 384, 768, 1024, 1152, 1664, 1920]
    assert all(offsets[first] % ALIGNMENT_VALUES == 0 for first in (0, 3, 4, 6))


def test_the_memory_the_weights_had_is_let_go():
    arrays = [np.ones(shape, dtype=np.float32) for shape in SHAPES]
    weights = [torch.nn.Parameter(torch.from_numpy(array)) for array in arrays]
    old = [weakref.ref(array) for array in arrays]
    del arrays
    assert all(reference() is not None for reference in old)
    flat = FlatLora(make_runs(weights))
    assert all(reference() is None for reference in old)
    assert all((weight == 1).all() for weight in flat.parts)


def test_a_step_of_the_one_parameter_is_a_step_of_each():
    """Bit for bit, over steps, with weight decay; and what is left free between runs stays zero."""
    plain, weights = make_weights(), make_weights()
    flat = FlatLora(make_runs(weights))
    each = torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.1)
    one = torch.optim.AdamW([flat.parameter], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        each.zero_grad()
        loss_of(plain).backward()
        each.step()
        flat.clear_gradients()
        loss_of(weights).backward()
        one.step()
        for weight in weights:
            weight.grad = None  # as the Trainer's model.zero_grad()
    assert all(torch.equal(weight, expected) for weight, expected in zip(weights, plain, strict=True))
    used = torch.zeros_like(flat.gradients, dtype=torch.bool)
    for weight in weights:
        flat.view_of(used, weight).fill_(True)
    assert 0 < (~used).sum() < len(SHAPES) * ALIGNMENT_VALUES
    assert not flat.parameter[~used].any()


def test_gradients_are_cleared_and_given_back():
    weights = make_weights()
    flat = FlatLora(make_runs(weights))
    loss_of(weights).backward()
    assert flat.parameter.grad is flat.gradients
    assert all(weight.grad.untyped_storage().data_ptr() == flat.gradients.data_ptr() for weight in weights)
    norm = torch.stack([weight.grad.square().sum() for weight in weights]).sum().sqrt()
    torch.testing.assert_close(flat.gradients.norm(), norm)
    for weight in weights:
        weight.grad = None
    flat.parameter.grad = None
    flat.clear_gradients()
    assert flat.parameter.grad is flat.gradients and not flat.gradients.any()
    loss_of(weights).backward()
    torch.testing.assert_close(flat.gradients.norm(), norm)


def test_a_loss_scaler_scales_gradients_back_once():
    plain, weights = make_weights(), make_weights()
    flat = FlatLora(make_runs(weights))
    loss_of(plain).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW([flat.parameter], lr=0.0)
    scaler.scale(loss_of(weights)).backward()
    scaler.unscale_(optimizer)
    for weight, expected in zip(weights, plain, strict=True):
        torch.testing.assert_close(weight.grad, expected.grad)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    scaler.scale(loss_of(weights)).backward()
    flat.gradients[5] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert optimizer.state[flat.parameter]["step"] == 1  # the second step was left out


def test_neighbours_are_one_matrix():
    weights = make_weights()
    flat = FlatLora(make_runs(weights), torch.bfloat16)
    matrix = flat.matrix(weights[:3])
    assert torch.equal(matrix.weight, torch.cat(weights[:3]))
    loss_of(weights).backward()
    assert torch.equal(matrix.gradient, torch.cat([weight.grad for weight in weights[:3]]))
    assert torch.equal(matrix.copy, torch.cat(weights[:3]).bfloat16())
    assert torch.equal(flat.matrix(weights[1:3]).weight, torch.cat(weights[1:3]))
    matrix.weight.mul_(2)
    assert torch.equal(matrix.weight, torch.cat(weights[:3]))


@pytest.mark.parametrize("chosen", [(1, 0), (0, 2), (2, 3), (4, 4), (6,)], ids=str)
def test_what_is_no_matrix_is_refused(chosen: tuple[int, ...]):
    weights = make_weights()
    flat = FlatLora(make_runs(weights))
    with pytest.raises(ValueError, match=r"directly behind|rows of"):
        flat.matrix([weights[index] for index in chosen])


def test_the_copy_is_as_of_the_last_refresh():
    weights = make_weights()
    flat = FlatLora(make_runs(weights), torch.bfloat16)
    assert flat.has_copy and flat.copy.dtype == torch.bfloat16
    assert torch.equal(flat.copy, flat.parameter.bfloat16())
    pointer = flat.copy.data_ptr()
    flat.parameter.data.mul_(2)
    assert not torch.equal(flat.copy, flat.parameter.bfloat16())
    flat.refresh()
    assert torch.equal(flat.copy, flat.parameter.bfloat16())
    assert flat.copy.data_ptr() == pointer


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_in_float32_the_weights_are_the_copy(dtype: torch.dtype | None):
    weights = make_weights()
    flat = FlatLora(make_runs(weights), dtype)
    assert not flat.has_copy
    assert flat.copy.data_ptr() == flat.parameter.data_ptr()
    flat.parameter.data.mul_(2)
    assert torch.equal(flat.matrix(weights[:3]).copy, torch.cat(weights[:3]))


def test_only_trained_weights_are_taken():
    weights = make_weights()
    weights[2].requires_grad = False
    frozen = weights[2].data_ptr()
    flat = FlatLora.each_alone(weights)
    assert flat.parts == [weight for weight in weights if weight.requires_grad]
    assert weights[2].data_ptr() == frozen and weights[2].grad is None
    assert all(part.storage_offset() % ALIGNMENT_VALUES == 0 for part in flat.parts)


def test_what_can_not_lie_together_is_refused():
    weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="twice"):
        FlatLora([[weight], [weight]])
    with pytest.raises(ValueError, match="one kind"):
        FlatLora([[weight], [torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))]])
    with pytest.raises(ValueError, match=r"float32, not torch\.float16"):
        FlatLora([[torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))]])
    with pytest.raises(ValueError, match="one kind"):
        FlatLora([])
