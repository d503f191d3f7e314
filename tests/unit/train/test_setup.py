"""What happens before the model loads: the GPU's driver is started only for a run that may use a GPU."""

from pathlib import Path

import pytest

from dsft.core.config.load import load_train_config
from dsft.core.errors import DsftError
from dsft.train import setup
from dsft.train.run import dry_run


class DriverWoken(Exception):
    """Ends the run where the driver would start."""


@pytest.fixture(autouse=True)
def _driver_that_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wake() -> None:
        raise DriverWoken

    monkeypatch.setattr(setup, "wake_cuda_driver", wake)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_driver_starts_before_pytorch_asks_for_it(device: str):
    with pytest.raises(DriverWoken):
        dry_run(load_train_config("tiny", None, {"device": device}), sink=lambda _: None)


def test_a_run_on_the_cpu_leaves_the_driver_alone():
    dry = dry_run(load_train_config("tiny", None, {"device": "cpu"}), sink=lambda _: None)
    assert dry.num_steps > 0


def test_what_is_wrong_with_the_names_is_told_first(tmp_path: Path):
    missing = str(tmp_path / "no-such-model")
    with pytest.raises(DsftError, match="no-such-model"):
        dry_run(load_train_config("tiny", None, {"device": "auto", "model_name": missing}), sink=lambda _: None)
