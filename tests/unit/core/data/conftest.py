"""The tokenizers that tests of the data write ids with."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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
