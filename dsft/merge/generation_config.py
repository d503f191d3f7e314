"""The generation_config.json of a merged model: the base's own settings, and the tokens that end an answer."""

from typing import Any

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_MARKS = ("_from_model_config", "transformers_version")
"""What transformers notes about a file that it made itself from config.json alone, which this one is not."""


def make_generation_config(
    base_generation_config: dict[str, Any] | None,
    model_config: dict[str, Any],
    stop_token_ids: list[int],
    pad_token_id: int | None,
) -> dict[str, Any]:
    """Return the content of generation_config.json.

    Args:
        base_generation_config: That of the base model; None where it has none.
        model_config: The base model's config.json, which names tokens that the other file does not.
        stop_token_ids: The tokens that end an answer in the prompt template of the run.
        pad_token_id: The tokenizer's padding token.

    Returns:
        What the base model had, with every token that ended its answers and every one that the run taught as the end:
        one id where there is one, else a list. Padding is the tokenizer's where the base names none.
    """
    base = base_generation_config or {}
    config = {key: value for key, value in base.items() if key not in (*_TOKENS, *_MARKS)}
    bos, base_eos, base_pad = (_list_ids(base.get(key)) or _list_ids(model_config.get(key)) for key in _TOKENS)
    eos = list(dict.fromkeys([*base_eos, *stop_token_ids]))
    pad = base_pad or _list_ids(pad_token_id)
    for key, ids in zip(_TOKENS, (bos, eos, pad), strict=True):
        if ids:
            config[key] = ids[0] if len(ids) == 1 else ids
    return config


def _list_ids(value: int | list[int] | None) -> list[int]:
    """Return the ids that a setting names; some models write -1 for none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return [token_id for token_id in ids if token_id >= 0]
