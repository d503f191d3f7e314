"""`dsft infer`: one prompt in, the answer's text out piece by piece, and what it took."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsft.core.data.prompts import TemplateName, get_template
from dsft.core.errors import DoesNotFitError, InputError, ModelError
from dsft.core.models.device import resolve_device
from dsft.core.models.find_run import ModelChoice, choose_model, find_base, find_tokenizer
from dsft.core.models.source import ModelSource
from dsft.core.models.tokenizer import load_tokenizer
from dsft.core.signals import held_signals
from dsft.infer.answer import Answer, StopReason
from dsft.infer.config import InferConfig
from dsft.infer.dtype import DtypeName, resolve_dtype
from dsft.infer.load_model import Placement, load_model
from dsft.infer.sampling import Sampling, choose_sampling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Notify = Callable[[str], None]


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
    model: str
    base: str | None
    template: str | None
    seed: int | None
    dtype: DtypeName
    device: str


@dataclass(frozen=True)
class _EncodedPrompt:
    # What the model reads, and how it will know that an answer in this form is over.
    token_ids: list[int]
    stop_token_ids: list[int]
    template: str | None


def run_infer(config: InferConfig, on_text: Callable[[str], None], on_notice: Notify) -> InferResult:
    """Answer one prompt.

    Args:
        config: The prompt and how it is answered.
        on_text: Receives the answer piece by piece, each as soon as it is certain.
        on_notice: Receives sentences the user should read: what was chosen or limited by itself.

    Returns:
        The whole answer and its figures.

    Raises:
        InputError: The prompt leaves no room for an answer, or model, tokenizer or settings can't be used.
        NoGpuError: A GPU was demanded and there is none.
        DoesNotFitError: The GPU's memory is too small.
    """
    choice = choose_model(config.model, config.base, Path(), "--model")
    if config.model is None:
        on_notice(f"Model: {choice.name}, the newest finished run.")
    with held_signals():
        # Not needed here yet, but imports are not to be interrupted.
        from peft import PeftModel  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401
    device = resolve_device(config.device)
    placement = Placement(device, resolve_dtype(config.dtype, device), config.use_4bit)
    source, base = find_base(choice)
    if base is not choice.bases[0]:
        on_notice(f"The base model {choice.bases[0].name} is not there; taking {base.name} from {base.origin}.")
    tokenizer = load_tokenizer(find_tokenizer(choice, source)).tokenizer
    prompt = _encode(config, choice, tokenizer, on_notice)
    num_room = _find_room(prompt, source)
    if num_room is not None and num_room < config.max_new_tokens:
        on_notice(f"At most {num_room} new tokens: no more fit into the model's context beside the prompt.")
    sampling = choose_sampling(config)

    with _telling_out_of_memory():
        model = load_model(source, choice.adapter_dir, placement)
        answer = _generate(config, model, tokenizer, prompt, num_room, sampling, on_text)
    return InferResult(
        text=answer.text,
        num_prompt_tokens=len(prompt.token_ids),
        num_new_tokens=answer.num_tokens,
        stop_reason=answer.stop_reason,
        time_to_first_token_s=answer.time_to_first_token_s,
        tok_per_s=answer.tok_per_s,
        model=choice.name,
        base=None if choice.adapter_dir is None else base.name,
        template=prompt.template,
        seed=sampling.seed,
        dtype=placement.dtype,
        device=device.kind,
    )


def _encode(
    config: InferConfig, choice: ModelChoice, tokenizer: "PreTrainedTokenizerFast", on_notice: Notify
) -> _EncodedPrompt:
    if config.is_raw:
        return _EncodedPrompt(tokenizer(config.prompt)["input_ids"], [int(tokenizer.eos_token_id)], None)
    name = _choose_template(config, choice, tokenizer, on_notice)
    template = get_template(name, tokenizer)
    token_ids = template.encode_prompt(config.prompt, config.system)
    return _EncodedPrompt(token_ids, list(template.stop_token_ids), name)


def _choose_template(
    config: InferConfig, choice: ModelChoice, tokenizer: "PreTrainedTokenizerFast", on_notice: Notify
) -> TemplateName:
    if config.template != "auto":
        if choice.template not in (None, config.template):
            on_notice(f"{choice.name} was trained with the template {choice.template}, not {config.template}.")
        return config.template
    if choice.template is not None:
        return choice.template
    name: TemplateName = "chat" if tokenizer.chat_template else "instruction"
    reason = "the tokenizer has a chat template" if name == "chat" else "the tokenizer has no chat template"
    on_notice(f"Template: {name}, because {reason} and {choice.name} records none; --template or --raw change it.")
    return name


def _find_room(prompt: _EncodedPrompt, source: ModelSource) -> int | None:
    """Return how many tokens fit into the model's context after the prompt; None where it has no limit."""
    vocab_size = source.model_config.get("vocab_size")
    if isinstance(vocab_size, int) and max(prompt.token_ids) >= vocab_size:
        raise ModelError(
            f"The tokenizer gives token {max(prompt.token_ids)}, but {source.name} has only {vocab_size} tokens.",
            "Tokenizer and model must belong together: check --model and --base.",
        )
    num_positions = source.model_config.get("max_position_embeddings")
    if not isinstance(num_positions, int):
        return None
    if len(prompt.token_ids) >= num_positions:
        raise InputError(
            f"The prompt has {len(prompt.token_ids)} tokens, and {source.name} reads at most {num_positions}, "
            "the answer included.",
            "Shorten the prompt.",
        )
    return num_positions - len(prompt.token_ids)


def _generate(
    config: InferConfig,
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompt: _EncodedPrompt,
    num_room: int | None,
    sampling: Sampling,
    on_text: Callable[[str], None],
) -> Answer:
    from dsft.infer.generate import generate_tokens, read_end_token_ids

    limit = config.max_new_tokens if num_room is None else min(config.max_new_tokens, num_room)
    stop_token_ids = list(dict.fromkeys([*prompt.stop_token_ids, *read_end_token_ids(model)]))
    limit_reason: StopReason = "max_new_tokens" if limit == config.max_new_tokens else "context_full"
    answer = Answer(tokenizer, stop_token_ids, config.stop, prompt.token_ids, limit_reason, on_text)
    generate_tokens(model, prompt.token_ids, limit, stop_token_ids, sampling, answer.push)
    answer.finish()
    return answer


@contextmanager
def _telling_out_of_memory() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).partition("\n")[0]
        raise DoesNotFitError(
            f"The GPU's memory is too small for this model or prompt: {first_line}",
            "Try --load-in-4bit or a shorter prompt, close other programs that use the GPU, or take --device cpu.",
        ) from error
