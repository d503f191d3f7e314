"""The small files of a merged model: configuration, tokenizer, chat template."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.core.data.turns import find_turn_pieces
from dsft.merge.chat_template import gives_training_ids, write_jinja
from dsft.merge.config import OutputDtype
from dsft.merge.plan import MergePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dsft.core.data.prompts import PromptTemplate

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_CHAT_TEMPLATE_FILE = "chat_template.jinja"
_OWN_TEMPLATES = ("instruction", "deepseek")
"""Prompt templates that no tokenizer brings along; the others are the tokenizer's, or none of a conversation."""


def make_model_config(
    base_config: dict[str, Any], architecture: str, plan: MergePlan, dtype: OutputDtype
) -> dict[str, Any]:
    """Return the content of the merged model's config.json: the base's, changed only where the model has changed."""
    config = {key: value for key, value in base_config.items() if key not in ("_name_or_path", "dtype")}
    config["architectures"] = [architecture]
    config["torch_dtype"] = dtype  # the older name, which all readers know
    config["vocab_size"] = plan.vocab_size
    if "tie_word_embeddings" in config or config.get("tie_word_embeddings", True) != plan.is_tied:
        config["tie_word_embeddings"] = plan.is_tied
    return config


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers' own look."""
    path.write_text(f"{json.dumps(content, indent=2, ensure_ascii=False)}\n", encoding="utf-8")


def choose_chat_template(template: "PromptTemplate | None", tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the Jinja template by which other programs write the run's prompts; None where there is none.

    A template of dsft's own is written out, if what it writes gives the ids of training; else the tokenizer's own.
    """
    if template is None or template.name not in _OWN_TEMPLATES:
        own = tokenizer.chat_template
        return own if isinstance(own, str) else None
    pieces = find_turn_pieces(template)
    if pieces is None:
        return None
    text = write_jinja(pieces)
    return text if gives_training_ids(text, template, tokenizer) else None


def copy_tokenizer(source: Path, folder: Path, chat_template: str | None) -> None:
    """Copy a tokenizer's files as they are, but for the chat template.

    Args:
        source: The tokenizer's folder.
        folder: Where the copy goes.
        chat_template: The chat template to write; None leaves out any.
    """
    for name in _TOKENIZER_FILES:
        if (source / name).is_file() and name != _CHAT_TEMPLATE_FILE:
            shutil.copyfile(source / name, folder / name)
    settings_file = folder / "tokenizer_config.json"
    if settings_file.is_file():
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        if settings.pop("chat_template", None) is not None:
            write_json(settings_file, settings)
    if chat_template is not None:
        (folder / _CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
