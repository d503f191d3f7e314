"""An adapter that can be merged, for tests to spoil."""

import shutil
from pathlib import Path

import pytest

from tests.merge_kinds import PLAIN
from tests.merge_models import write_base, write_lora
from tests.unit.merge.refusals import change_json


@pytest.fixture(scope="session")
def plain_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_lora(folder / "adapter", write_base(folder / "base"), PLAIN.settings)
    return folder


@pytest.fixture
def adapter(plain_models: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, and of its base in the folder `base` beside it."""
    shutil.copytree(plain_models, tmp_path / "models")
    folder = tmp_path / "models" / "adapter"
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "models" / "base"))
    return folder
