"""`dsft infer`: one prompt in, the answer's text out piece by piece, and what it took."""

from dsft.core.data.prompts import Prompt
from dsft.core.notices import Notify
from dsft.infer.answer import OnText
from dsft.infer.config import InferConfig
from dsft.infer.prompts import check_prompt
from dsft.infer.result import InferResult
from dsft.infer.session import Session


def run_infer(config: InferConfig, prompt: Prompt, on_text: OnText, on_notice: Notify) -> InferResult:
    """Answer one prompt.

    Args:
        config: Which model answers, and how.
        prompt: What is asked, before any template.
        on_text: Receives the answer piece by piece, each as soon as it is certain; True ends it.
        on_notice: Receives sentences the user should read: what was chosen or limited by itself.

    Returns:
        The whole answer and its figures.

    Raises:
        InputError: The prompt leaves no room for an answer, or model, tokenizer or settings can't be used.
        NoGpuError: A GPU was demanded and there is none.
        DoesNotFitError: The GPU's memory is too small.
    """
    check_prompt(prompt)  # before a search for the model
    session = Session(config, on_notice)
    encoded = session.encode(prompt)
    session.tell_limit(encoded)
    return session.answer(encoded, on_text)
