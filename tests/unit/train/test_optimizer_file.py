"""A flat optimizer steps as one of many tensors does; its file is theirs, and fits another order in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from dsft.core.engine.flat_lora import FlatLora
from dsft.core.errors import CheckpointError
from dsft.train.optimizer_file import OPTIMIZER_FILE, SCHEDULE_FILE, read_optimizer, write_optimizer
from dsft.train.trainer import QloraTrainer
from tests.unit.train.test_recovery import optimizers
from tests.unit.train.test_trainer import Run, lora_weights

SHAPES = [(8, 33), (16, 8), (5, 33), (7,)]
MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
each_kind = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in optimizers()])


def make_weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def make_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def take_step(weights, optimizer, schedule) -> None:
    for weight in weights:
        weight.grad.copy_(torch.sin(weight.detach()))
    optimizer.step()
    schedule.step()


def start(make: MakeOptimizer, order: tuple[int, ...]):
    """Weights in their order, an optimizer of them in another order in one tensor, its schedule and that tensor."""
    weights = make_weights()
    lora = FlatLora([[weights[index] for index in order]])
    optimizer = make([lora.parameter])
    return weights, optimizer, make_schedule(optimizer), lora


def start_apart(make: MakeOptimizer):
    weights = make_weights()
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = make(weights)
    return weights, optimizer, make_schedule(optimizer)


@each_kind
def test_the_state_goes_on_in_another_order(make: MakeOptimizer, tmp_path: Path):
    weights, optimizer, schedule, lora = start(make, (0, 1, 2, 3))
    for _ in range(3):
        take_step(weights, optimizer, schedule)
    write_optimizer(tmp_path, optimizer, schedule, lora, weights)
    resumed, its_optimizer, its_schedule, its_lora = start(make, (2, 0, 3, 1))
    for weight, value in zip(resumed, weights, strict=True):
        weight.data.copy_(value.data)
    read_optimizer(tmp_path, its_optimizer, its_schedule, its_lora, resumed)
    for _ in range(2):
        take_step(weights, optimizer, schedule)
        take_step(resumed, its_optimizer, its_schedule)
    assert all(torch.equal(weight, value) for weight, value in zip(resumed, weights, strict=True))
    assert its_schedule.get_last_lr() == schedule.get_last_lr()


@each_kind
def test_the_file_is_that_of_weights_apart(make: MakeOptimizer, tmp_path: Path):
    """So a checkpoint from before they lay together is gone on with."""
    weights, optimizer, schedule, lora = start(make, (2, 0, 3, 1))
    apart, apart_optimizer, apart_schedule = start_apart(make)
    for _ in range(3):
        take_step(weights, optimizer, schedule)
        take_step(apart, apart_optimizer, apart_schedule)
    write_optimizer(tmp_path, optimizer, schedule, lora, weights)
    written, expected = torch.load(tmp_path / OPTIMIZER_FILE, weights_only=True), apart_optimizer.state_dict()
    assert written["param_groups"] == expected["param_groups"]
    assert_same(written["state"], expected["state"])

    (tmp_path / "before").mkdir()
    torch.save(expected, tmp_path / "before" / OPTIMIZER_FILE)
    torch.save(apart_schedule.state_dict(), tmp_path / "before" / SCHEDULE_FILE)
    resumed, its_optimizer, its_schedule, its_lora = start(make, (3, 1, 0, 2))
    for weight, value in zip(resumed, apart, strict=True):
        weight.data.copy_(value.data)
    read_optimizer(tmp_path / "before", its_optimizer, its_schedule, its_lora, resumed)
    take_step(apart, apart_optimizer, apart_schedule)
    take_step(resumed, its_optimizer, its_schedule)
    assert all(torch.equal(weight, value) for weight, value in zip(resumed, apart, strict=True))


def assert_same(value: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert isinstance(value, dict) and value.keys() == expected.keys()
        for name, part in expected.items():
            assert_same(value[name], part)
    elif isinstance(expected, torch.Tensor):
        assert isinstance(value, torch.Tensor) and torch.equal(value, expected)
    else:
        assert value == expected


@each_kind
def test_an_optimizer_without_state_is_kept_so(make: MakeOptimizer, tmp_path: Path):
    weights, optimizer, schedule, lora = start(make, (0, 1, 2, 3))
    write_optimizer(tmp_path, optimizer, schedule, lora, weights)
    resumed, its_optimizer, its_schedule, its_lora = start(make, (0, 1, 2, 3))
    read_optimizer(tmp_path, its_optimizer, its_schedule, its_lora, resumed)
    assert not its_optimizer.state


@pytest.mark.parametrize("damage", ["one too few", "another shape", "a moment less"])
def test_the_state_of_other_weights_is_refused(tmp_path: Path, damage: str):
    make = torch.optim.AdamW
    weights, optimizer, schedule, lora = start(make, (0, 1, 2, 3))
    take_step(weights, optimizer, schedule)
    write_optimizer(tmp_path, optimizer, schedule, lora, weights)
    saved = torch.load(tmp_path / OPTIMIZER_FILE, weights_only=True)
    if damage == "one too few":
        del saved["state"][3]
    elif damage == "another shape":
        saved["state"][1]["exp_avg"] = saved["state"][1]["exp_avg"].T
    else:
        del saved["state"][1]["exp_avg"]
    torch.save(saved, tmp_path / OPTIMIZER_FILE)
    _, fresh, its_schedule, its_lora = start(make, (0, 1, 2, 3))
    with pytest.raises(CheckpointError, match="other weights than this model's"):
        read_optimizer(tmp_path, fresh, its_schedule, its_lora, its_lora.parts)
    assert not fresh.state


class TrainerOfEach(QloraTrainer):
    """The optimizer and the clipping that transformers makes, tensor by tensor."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        return Trainer.create_optimizer(self, model)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        return Trainer._clip_grad_norm(self, model)

    def _write_checkpoint_files(self, folder: Path) -> None:
        self.save_adapter(folder)


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.01])
def test_a_run_is_that_of_an_optimizer_of_each_weight(load_model, tmp_path: Path, max_grad_norm: float):
    """Bit for bit where nothing is clipped; the norm of all is summed in another order."""
    model, plain_model = load_model(dropout=0.1), load_model(dropout=0.1)

    def train(model, is_flat: bool) -> Run:
        run = Run(model, tmp_path / str(is_flat), steps=6)
        if not is_flat:
            run.trainer.__class__ = TrainerOfEach
        run.trainer.args.max_grad_norm = max_grad_norm
        run.trainer.args.weight_decay = 0.1
        return run.train()

    run, plain = train(model, is_flat=True), train(plain_model, is_flat=False)
    assert [len(group["params"]) for group in run.trainer.optimizer.param_groups] == [1, 0]
    assert [len(group["params"]) for group in plain.trainer.optimizer.param_groups] == [28, 0]
    if max_grad_norm == 1e9:
        assert run.losses == plain.losses
    assert run.losses == pytest.approx(plain.losses, rel=1e-6)
    before = lora_weights(load_model())
    for name, weight in lora_weights(model).items():
        assert not torch.equal(weight, before[name])
        if max_grad_norm == 1e9:
            assert torch.equal(weight, lora_weights(plain_model)[name])
        torch.testing.assert_close(weight, lora_weights(plain_model)[name], rtol=1e-3, atol=1e-6)
