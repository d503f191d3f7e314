"""The versions of a run: complete, true, and without loading anything heavy."""

import importlib.metadata
import subprocess
import sys

from dsft import __version__
from dsft.core.versions import versions


def test_names_dsft_python_and_the_packages_of_a_run() -> None:
    found = versions()
    assert found["dsft"] == __version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "tokenizers"):
        assert found[name] == importlib.metadata.version(name)


def test_loads_no_heavy_package() -> None:
    code = (
        "import sys; from dsft.core.versions import versions; versions(); "
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_names_cuda_only_where_torch_has_it() -> None:
    import torch

    assert versions().get("cuda") == torch.version.cuda
