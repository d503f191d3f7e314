"""How the next token is chosen; no torch here."""

import secrets
from dataclasses import dataclass

from dsft.infer.config import InferConfig


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_p: Share of probability sampled from; 1 is all.
        top_k: Number of likeliest tokens sampled from; 0 is all.
        repetition_penalty: Penalty on tokens seen before; 1 is none.
        seed: Seed of the random numbers; not used at temperature 0.
    """

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None


def choose_sampling(config: InferConfig) -> Sampling:
    """Return what a configuration's sampling options mean together; a seed is drawn where one is needed."""
    if not config.is_sampling:
        return Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=config.repetition_penalty, seed=None)
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k or 0,
        repetition_penalty=config.repetition_penalty,
        seed=secrets.randbits(32) if config.seed is None else config.seed,
    )
