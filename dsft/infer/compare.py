"""The same prompt answered by the base model alone and with the adapter."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dsft.core.data.prompts import Prompt
from dsft.core.errors import ConfigError
from dsft.core.notices import Notify
from dsft.infer.config import InferConfig
from dsft.infer.prompts import check_prompt
from dsft.infer.result import InferResult
from dsft.infer.session import Session

Side = Literal["base", "adapter"]


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt.

    Attributes:
        base: Of the base model alone.
        adapter: Of the base model with the adapter.
    """

    base: InferResult
    adapter: InferResult


def run_compare(
    config: InferConfig,
    prompt: Prompt,
    on_side: Callable[[Side, str], None],
    on_text: Callable[[Side, str], None],
    on_notice: Notify,
) -> Comparison:
    """Answer one prompt twice, with the same template, settings and seed.

    Args:
        config: Which model answers, and how.
        prompt: What is asked, before any template.
        on_side: Receives who answers next, first the base, and the name of its model.
        on_text: Receives the answers piece by piece.
        on_notice: Receives sentences the user should read: what was chosen or limited by itself.

    Raises:
        ConfigError: The model has no adapter.
        InputError: The prompt leaves no room for an answer, or model, tokenizer or settings can't be used.
        NoGpuError: A GPU was demanded and there is none.
        DoesNotFitError: The GPU's memory is too small.
    """
    check_prompt(prompt)  # before a search for the model
    if config.is_sampling and config.seed is None:
        config = replace(config, seed=secrets.randbits(32))
    session = Session(config, on_notice)
    if session.base_name is None:
        raise ConfigError(
            f"--compare needs an adapter, and {session.model_name} is a whole model.",
            "Name an adapter's folder with --model, or leave --compare out.",
        )
    encoded = session.encode(prompt)
    session.tell_limit(encoded)
    on_side("base", session.base_name)
    base = session.answer(encoded, lambda text: on_text("base", text), use_adapter=False)
    on_side("adapter", session.model_name)
    adapter = session.answer(encoded, lambda text: on_text("adapter", text))
    return Comparison(base, adapter)
