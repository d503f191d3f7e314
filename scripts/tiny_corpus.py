"""The embedded demo model's pretraining text: from a folder of Python sources to streams and rows of token ids."""

import hashlib
from pathlib import Path

import torch
from tiny_model import EOS_ID, stop
from tokenizers import Tokenizer


def is_validation_file(relative_path: str) -> bool:
    """Tell whether a file belongs to the 10 % held out, by a hash of its path: the same on every machine."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 10 == 0


def read_sources(folder: Path) -> tuple[list[str], list[str]]:
    """Read all Python sources under a folder, in the order of their paths.

    Installed packages, files that are not UTF-8 and the build's own settings (`_sysconfigdata*`, made by the machine
    and naming its paths) are left out.

    Args:
        folder: Where to look, all levels down.

    Returns:
        The texts to train on, and those held out.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    relative_paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.is_file())
    for relative_path in relative_paths:
        if {"site-packages", "dist-packages"} & set(relative_path.split("/")) or "_sysconfigdata" in relative_path:
            continue
        try:
            text = (folder / relative_path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            parts[is_validation_file(relative_path)].append(text)
    if not parts[0] or not parts[1]:
        stop(f"{folder} holds too few Python files: {len(parts[0])} to train on and {len(parts[1])} held out.")
    return parts


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Turn texts into one stream: BOS, text, EOS, BOS, text, EOS.

    Args:
        tokenizer: As `train_tokenizer` makes it.
        texts: The documents.

    Returns:
        Token ids, int16, shape [num_tokens].
    """
    documents = [torch.tensor([*e.ids, EOS_ID], dtype=torch.int16) for e in tokenizer.encode_batch_fast(texts)]
    return torch.cat(documents)


def cut_windows(tokens: torch.Tensor, window: int, max_tokens: int) -> torch.Tensor:
    """Cut a stream into rows of window + 1 tokens that predict each token once; spread evenly when not all are taken.

    Args:
        tokens: Token ids, shape [num_tokens].
        window: Tokens predicted in each row.
        max_tokens: Predicted tokens at most.

    Returns:
        Token ids, int64, shape [rows, window + 1].
    """
    rows = tokens.unfold(0, window + 1, window)
    num_rows = min(len(rows), max(1, max_tokens // window))
    return rows[torch.linspace(0, len(rows) - 1, num_rows).long()].long()
