"""The loops that generate: token by token in one or several rows, or with drafts that one pass checks at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dsft.infer.decoding.choose import TokenChooser, check_token
from dsft.infer.decoding.decoder import Decoder
from dsft.infer.decoding.draft import PromptLookup
from dsft.infer.sampling import Sampling


@dataclass(frozen=True)
class Speculation:
    """What drafts were good for.

    Attributes:
        num_drafted: Tokens that were proposed.
        num_accepted: Those of them that the model itself chose.
        num_passes: Passes through the model after the prompt's.
    """

    num_drafted: int
    num_accepted: int
    num_passes: int


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    sampling: Sampling,
    on_token: Callable[[int, int], bool],
) -> None:
    """Generate in all rows at once until each has ended.

    The pass that reads a token is begun before the token is told, so that the device does not wait for the receiver.

    Args:
        decoder: Reads the tokens.
        prompts: Token ids of the prompts, at most `decoder.max_rows`.
        max_new_tokens: Most tokens to generate, in each row at least 1.
        sampling: How tokens are chosen.
        on_token: Receives the index of the prompt and its next token; returns whether that row has ended.

    Raises:
        ModelError: The model's outputs are NaN.
    """
    with _forgetting_on_errors(decoder):
        chooser = TokenChooser(sampling, prompts, decoder.device)
        rows = list(range(len(prompts)))
        num_left = list(max_new_tokens)
        chosen = chooser.choose(decoder.start(prompts, max(max_new_tokens)))
        while rows:
            told = _Told(chosen)
            is_last = all(num_left[row] == 1 for row in rows)
            if not is_last:  # rows that end here read one token in vain, and what stands for NaN is no token
                chosen = chooser.choose(decoder.step(chosen.clamp(min=0)))
            going = []
            token_ids = told.read()
            if not is_last:
                decoder.know(token_ids)
            for place, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
                num_left[row] -= 1
                has_ended = on_token(row, check_token(token_id))
                if not has_ended and num_left[row] > 0:
                    going.append(place)
            if len(going) < len(rows) and going:
                decoder.keep(going)
                chooser.keep(going)
                chosen = chosen[going]
            rows = [rows[place] for place in going]


def generate_with_drafts(
    decoder: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    on_token: Callable[[int], bool],
) -> Speculation:
    """Generate in one row, several tokens a pass where the text repeats itself (prompt lookup decoding).

    A draft is what followed the same tokens earlier in the text. The model reads it in one pass; what it would have
    chosen itself is taken, and the first other choice ends the draft. So each token is chosen from the logits that
    come after the tokens before it, as without drafts; sampling draws in the same order.

    Args:
        decoder: Reads the tokens.
        prompt: Token ids of the prompt.
        max_new_tokens: Most tokens to generate, at least 1.
        sampling: How tokens are chosen.
        on_token: Receives the next token; returns whether the answer has ended.

    Raises:
        ModelError: The model's outputs are NaN.
    """
    num_drafted = num_accepted = num_passes = 0
    with _forgetting_on_errors(decoder):
        chooser = TokenChooser(sampling, [prompt], decoder.device)
        lookup = PromptLookup(prompt)
        num_left = max_new_tokens
        logits = decoder.start([prompt], max_new_tokens)
        draft: list[int] = []
        while True:
            accepted = 0
            for token_id in _choose_along(chooser, logits, draft):
                num_left -= 1
                is_draft = accepted < len(draft) and token_id == draft[accepted]
                accepted += is_draft
                num_accepted += is_draft
                if on_token(token_id) or num_left == 0:
                    return Speculation(num_drafted, num_accepted, num_passes)
                lookup.append(token_id)
            decoder.rewind(len(draft) - accepted)
            draft = lookup.find(num_left - 1)
            num_drafted += len(draft)
            num_passes += 1
            logits = decoder.extend([token_id, *draft])


def _choose_along(chooser: TokenChooser, logits: torch.Tensor, draft: Sequence[int]) -> Iterator[int]:
    """Yield the tokens chosen after each token of a draft, up to the first that the draft does not have.

    Args:
        chooser: Chooses them.
        logits: After the token before the draft and after each of the draft's, [1 + len(draft), vocab_size].
        draft: The tokens that were proposed.
    """
    if chooser.is_plain_argmax:
        choices = iter(chooser.choose(logits).tolist())
    else:  # what is drawn or penalized depends on what was chosen before
        choices = (int(chooser.choose(row[None])) for row in logits)
    for place, token_id in enumerate(choices):
        yield check_token(token_id)
        if place == len(draft) or token_id != draft[place]:
            return


@contextmanager
def _forgetting_on_errors(decoder: Decoder) -> Iterator[None]:
    try:
        yield
    except BaseException:  # an interrupt too: what was read up to it is not known
        decoder.reset()
        raise


class _Told:
    """Token ids on their way from the device, while it goes on to compute."""

    def __init__(self, token_ids: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._token_ids = token_ids
        if token_ids.is_cuda:
            self._token_ids = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            self._token_ids.copy_(token_ids, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[int]:
        """Wait for the token ids alone, not for what the device computes since."""
        if self._event is not None:
            self._event.synchronize()
        token_ids: list[int] = self._token_ids.tolist()
        return token_ids
