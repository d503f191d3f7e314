"""The tokenizers that tests of the data write ids with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsft.core.config.schema import TrainConfig
from dsft.core.data.prepare import PreparedData, prepare_data
from dsft.core.data.sources import open_source
from tests.unit.core.data.preparing import Prepare
from tests.unit.core.data.small_tokenizer import CHAT_ML, make_deepseek_like


@pytest.fixture(scope="session")
def deepseek(shared: Path) -> PreTrainedTokenizerFast:
    """DeepSeek-Coder's real tokenizer."""
    return AutoTokenizer.from_pretrained(shared / "assets" / "deepseek-coder-6.7b", local_files_only=True)


@pytest.fixture(scope="session")
def small() -> PreTrainedTokenizerFast:
    """A small tokenizer of the same kind."""
    return make_deepseek_like()


@pytest.fixture(scope="session")
def small_chat() -> PreTrainedTokenizerFast:
    """The same with a chat template."""
    return make_deepseek_like(CHAT_ML)


@pytest.fixture
def prepare(small: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepare data with settings and a cache of the test's own, in the folder in which the test stands."""
    monkeypatch.chdir(tmp_path)

    def prepare_with(
        *, fingerprint: str = "small", on_rows: Callable[[int], None] = lambda num_rows: None, **settings: Any
    ) -> PreparedData:
        config = TrainConfig(**{"dataset": "f.jsonl", "max_length": 400, "validation_split": 0.25} | settings)
        source = open_source(config.dataset, split=config.dataset_split, revision=config.dataset_revision)
        cache = tmp_path / "cache"
        return prepare_data(config, source, small, tokenizer_fingerprint=fingerprint, cache=cache, on_rows=on_rows)

    return prepare_with
