"""Other libraries stay silent."""

import subprocess
import sys

import pytest

IMPORT_AND_USE = """
from dsft.cli.noise import silence_libraries
silence_libraries()
import bitsandbytes, datasets, peft, transformers, trl
import torch
import warnings
layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
layer(torch.ones(1, 64))
warnings.warn("a library's warning")
"""


@pytest.mark.long
def test_importing_and_using_the_libraries_writes_nothing() -> None:
    completed = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_USE],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (completed.stdout, completed.stderr) == ("", "")
