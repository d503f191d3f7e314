"""What an answer was and what it took."""

from dataclasses import dataclass

from dsft.infer.answer import StopReason
from dsft.infer.decoding.loop import Speculation
from dsft.infer.dtype import DtypeName


@dataclass(frozen=True)
class InferResult:
    """An answer and what it took; the object that `--json` prints.

    Attributes:
        text: The answer, without end token and stop string.
        num_prompt_tokens: Tokens of the prompt with its template.
        num_new_tokens: Tokens generated, the end token included.
        stop_reason: Why the answer ended.
        time_to_first_token_s: From the start of the computation, model loaded, to the first token.
        tok_per_s: Tokens after the first one by the seconds they took; None where there are none.
        load_s: What loading the model and making it ready took, in this process.
        peak_memory_bytes: Most memory so far: on a GPU what PyTorch has reserved there, else what the process has.
        speculation: What drafts were good for; None where there were none.
        model: The model as named or found.
        base: Base model of an adapter; None for a whole model.
        template: Prompt template; None for a raw prompt.
        seed: Seed of the sampling; None where nothing was drawn.
        dtype: Type of weights and arithmetic.
        device: "cuda" or "cpu".
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    stop_reason: StopReason
    time_to_first_token_s: float
    tok_per_s: float | None
    load_s: float
    peak_memory_bytes: int
    speculation: Speculation | None
    model: str
    base: str | None
    template: str | None
    seed: int | None
    dtype: DtypeName
    device: str
