"""Tokens of an answer, one after the other, through transformers' `generate`. No text here."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from dsft.core.errors import ModelError
from dsft.infer.sampling import Sampling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def generate_tokens(
    model: "PreTrainedModel | PeftModel",
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    sampling: Sampling,
    on_token: Callable[[int], bool],
) -> None:
    """Generate until a stop token, the limit, or until the receiver has enough.

    Args:
        model: The model, in evaluation mode.
        prompt_ids: Token ids of the prompt, special tokens included.
        max_new_tokens: Most tokens to generate.
        stop_token_ids: Tokens that end the answer; at least one.
        sampling: How tokens are chosen. What the model's own generation config says about it does not count.
        on_token: Receives each new token, a stop token too, as soon as it is chosen; returns whether to stop.

    Raises:
        ModelError: The model's outputs are NaN.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids),
        pad_token_id=stop_token_ids[0],  # one prompt at a time is never padded; unset, transformers warns
        repetition_penalty=sampling.repetition_penalty,
        use_cache=True,
        do_sample=sampling.temperature > 0,
        **_sampling_arguments(sampling),
    )
    # generate fills whatever a config leaves open from the model's own, which is another source of sampling settings.
    model.generation_config = GenerationConfig()
    input_ids = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=model.device)  # [1, num_prompt_tokens]
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=config,
        logits_processor=[_RefuseNan()],
        stopping_criteria=[_TellEachToken(on_token)],
    )


def read_end_token_ids(model: "PreTrainedModel | PeftModel") -> list[int]:
    """Return the tokens that the model's own generation config ends at; `generate_tokens` sets that config aside."""
    token_ids: int | list[int] | None = model.generation_config.eos_token_id
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)


def _sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}


class _TellEachToken(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    # A stopping criterion sees each token before the next one is computed, and can end it there; a streamer can't.
    def __init__(self, on_token: Callable[[int], bool]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_enough = self._on_token(int(input_ids[0, -1]))
        return torch.full((1,), is_enough, dtype=torch.bool, device=input_ids.device)


class _RefuseNan(LogitsProcessor):  # type: ignore[misc]
    # Greedy search would answer with token 0 without end, sampling would fail inside a kernel.
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(scores.isnan().any()):
            raise ModelError(
                "The model's outputs are NaN: its weights are damaged or its arithmetic overflowed.",
                "Try --dtype bfloat16 or float32; if that does not help, copy the model again.",
            )
        return scores
