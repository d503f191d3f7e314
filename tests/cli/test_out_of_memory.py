"""Too little memory while a model loads is told as that, and not as damaged weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsft.cli.app import main

ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
)


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    "command", [("train", "--preset", "tiny"), ("infer", "x", "--model", "builtin:tiny/model", "--device", "cpu")]
)
def test_it_ends_with_exit_code_3(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert main([*command]) == 3
    assert "memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
