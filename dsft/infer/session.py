"""A model that answers: found and checked at once, loaded when it is needed, asked as often as one likes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.core.data.prompts import FimPrompt, Prompt
from dsft.core.errors import DoesNotFitError, is_gpu_out_of_memory, take_first_line
from dsft.core.host_memory import peak_host_bytes
from dsft.core.models.device import resolve_device
from dsft.core.models.find_run import choose_model, find_base, find_tokenizer
from dsft.core.models.source import fingerprint_weights
from dsft.core.models.tokenizer import load_tokenizer
from dsft.core.notices import Notify
from dsft.core.signals import held_signals
from dsft.infer.answer import Answer, OnText, StopReason
from dsft.infer.config import InferConfig
from dsft.infer.dtype import resolve_dtype
from dsft.infer.load_model import Placement, load_model
from dsft.infer.prompts import EncodedPrompt, PromptEncoder
from dsft.infer.result import InferResult
from dsft.infer.sampling import Sampling, choose_sampling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from dsft.infer.decoding.decoder import Decoder
    from dsft.infer.decoding.loop import Speculation


class Session:
    """A model, its tokenizer and its settings. Making one finds and checks everything but the weights.

    Args:
        config: Which model, and how it answers.
        on_notice: Receives sentences the user should read: what was chosen or limited by itself.

    Attributes:
        config: The same.
        model_name: The model as named or found.
        base_name: Base model of an adapter; None for a whole model.

    Raises:
        InputError: Model, tokenizer or settings can't be used.
        NoGpuError: A GPU was demanded and there is none.
    """

    def __init__(self, config: InferConfig, on_notice: Notify) -> None:
        choice = choose_model(config.model, config.base, Path(), "--model")
        if config.model is None:
            on_notice(f"Model: {choice.name}, the newest finished run.")
        with held_signals():
            # Not needed here yet, but imports are not to be interrupted.
            from peft import PeftModel  # noqa: F401
            from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401
        device = resolve_device(config.device)
        self.config = config
        self._placement = Placement(device, resolve_dtype(config.dtype, device), config.use_4bit)
        self._source, base = find_base(choice)
        if base is not choice.bases[0]:
            on_notice(f"The base model {choice.bases[0].name} is not there; taking {base.name} from {base.origin}.")
        self._choice = choice
        self._tokenizer = load_tokenizer(find_tokenizer(choice, self._source)).tokenizer
        self._encoder = PromptEncoder(config, choice, self._source, self._tokenizer, on_notice)
        self._on_notice = on_notice
        self._model: Any = None
        self._decoder: Decoder | None = None
        self._own_end_token_ids: list[int] = []
        self._load_s = 0.0
        self.model_name = choice.name
        self.base_name = None if choice.adapter_dir is None else base.name

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Return a prompt's token ids; see `PromptEncoder.encode`."""
        return self._encoder.encode(prompt)

    def encode_gap(self, prompt: FimPrompt) -> tuple[EncodedPrompt, int]:
        """Return a gap's token ids, cut where needed, and how much was; see `PromptEncoder.encode_gap`."""
        return self._encoder.encode_gap(prompt, self.config.max_new_tokens)

    def fingerprint(self) -> str:
        """Return what tells this model, adapter included, from others; see `fingerprint_weights`."""
        folder = self._choice.adapter_dir
        base = fingerprint_weights(self._source)
        if folder is None:
            return base
        adapter = replace(self._source, location=str(folder.resolve()), revision=None, commit=None)
        return f"{base} {fingerprint_weights(adapter)}"

    def limit_for(self, prompt: EncodedPrompt) -> int:
        """Return the most tokens that an answer to a prompt can have."""
        limit = self.config.max_new_tokens
        return limit if prompt.num_room is None else min(limit, prompt.num_room)

    def tell_limit(self, prompt: EncodedPrompt) -> None:
        """Tell how many tokens an answer to a prompt can have, where that is fewer than were asked for."""
        limit = self.limit_for(prompt)
        if limit < self.config.max_new_tokens:
            self._on_notice(f"At most {limit} new tokens: no more fit into the model's context beside the prompt.")

    def load(self) -> "Decoder":
        """Load the weights, if that was not done before; return what decodes with them.

        Raises:
            ModelError: Weights are missing, damaged, not finite or of another shape.
            DoesNotFitError: The GPU's memory is too small.
        """
        if self._decoder is not None:
            return self._decoder
        started_s = time.perf_counter()
        with _telling_out_of_memory():
            from dsft.infer.decoding.make import make_decoder, read_end_token_ids

            model = load_model(self._source, self._choice.adapter_dir, self._placement, self._on_notice)
            self._own_end_token_ids = read_end_token_ids(model)
            self._decoder = make_decoder(model, self._on_notice)
            self._model = model
        self._load_s = time.perf_counter() - started_s
        return self._decoder

    def answer(self, prompt: EncodedPrompt, on_text: OnText, *, use_adapter: bool = True) -> InferResult:
        """Answer one prompt.

        Args:
            prompt: From `encode`.
            on_text: Receives the answer piece by piece, each as soon as it is certain; True ends it.
            use_adapter: Whether the adapter, where there is one, takes part.

        Raises:
            ModelError: The model can't be loaded, or its outputs are NaN.
            DoesNotFitError: The GPU's memory is too small.
        """
        self.load()
        sampling = choose_sampling(self.config)
        answer = self._begin(prompt, on_text)
        with _telling_out_of_memory(), self._decoding(use_adapter) as decoder:
            from dsft.infer.decoding.loop import generate, generate_with_drafts

            speculation = None
            if self.config.is_speculating:
                speculation = generate_with_drafts(
                    decoder, prompt.token_ids, self.limit_for(prompt), sampling, answer.push
                )
            else:
                generate(
                    decoder, [prompt.token_ids], [self.limit_for(prompt)], sampling, lambda _, token: answer.push(token)
                )
            answer.finish()
            return self._make_result(prompt, answer, sampling, speculation)

    def answer_all(
        self,
        prompts: Sequence[EncodedPrompt],
        on_answer: Callable[[int, InferResult], None],
        *,
        use_adapter: bool = True,
        seed: int | None = None,
    ) -> None:
        """Answer several prompts at once.

        Args:
            prompts: From `encode`, at most `max_rows`; those of like lengths go together best.
            on_answer: Receives the index of a prompt and its answer, in the order in which they end.
            use_adapter: Whether the adapter, where there is one, takes part.
            seed: Seed of the sampling, instead of the configuration's: calls that share one draw the same numbers.

        Raises:
            ModelError: The model can't be loaded, or its outputs are NaN.
            DoesNotFitError: The GPU's memory is too small.
        """
        if not prompts:
            return
        self.load()
        sampling = choose_sampling(self.config if seed is None else replace(self.config, seed=seed))
        answers = [self._begin(prompt, lambda _: None) for prompt in prompts]
        limits = [self.limit_for(prompt) for prompt in prompts]

        def push(index: int, token_id: int) -> bool:
            answer = answers[index]
            has_ended = answer.push(token_id) or answer.num_tokens == limits[index]
            if has_ended:
                answer.finish()
                on_answer(index, self._make_result(prompts[index], answer, sampling, None))
            return has_ended

        with _telling_out_of_memory(), self._decoding(use_adapter) as decoder:
            from dsft.infer.decoding.loop import generate

            generate(decoder, [prompt.token_ids for prompt in prompts], limits, sampling, push)

    @property
    def model(self) -> "PreTrainedModel | PeftModel":
        """The model that is decoded, for what compares with transformers' own generation; loads it."""
        self.load()
        model: PreTrainedModel | PeftModel = self._model
        return model

    @property
    def max_rows(self) -> int:
        """Most prompts at once; loads the model."""
        return self.load().max_rows

    def _begin(self, prompt: EncodedPrompt, on_text: OnText) -> Answer:
        limit = self.limit_for(prompt)
        limit_reason: StopReason = "max_new_tokens" if limit == self.config.max_new_tokens else "context_full"
        stop_token_ids = {*prompt.stop_token_ids, *self._own_end_token_ids}
        return Answer(self._tokenizer, stop_token_ids, self.config.stop, prompt.token_ids, limit_reason, on_text)

    @contextmanager
    def _decoding(self, use_adapter: bool) -> "Iterator[Decoder]":
        decoder = self.load()
        if use_adapter or self._choice.adapter_dir is None:
            yield decoder
            return
        with decoder.without_adapter():
            yield decoder

    def _make_result(
        self, prompt: EncodedPrompt, answer: Answer, sampling: Sampling, speculation: "Speculation | None"
    ) -> InferResult:
        return InferResult(
            text=answer.text,
            num_prompt_tokens=len(prompt.token_ids),
            num_new_tokens=answer.num_tokens,
            stop_reason=answer.stop_reason,
            time_to_first_token_s=answer.time_to_first_token_s,
            tok_per_s=answer.tok_per_s,
            load_s=self._load_s,
            peak_memory_bytes=_read_peak_bytes(self._placement.device.kind),
            speculation=speculation,
            model=self.model_name,
            base=self.base_name,
            template=prompt.template,
            seed=sampling.seed,
            dtype=self._placement.dtype,
            device=self._placement.device.kind,
        )


def _read_peak_bytes(device_kind: str) -> int:
    if device_kind == "cpu":
        return peak_host_bytes()
    import torch

    return int(torch.cuda.max_memory_reserved())


@contextmanager
def _telling_out_of_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch's allocator, of the driver, of a library
        if not is_gpu_out_of_memory(error):
            raise
        raise DoesNotFitError(
            f"The GPU's memory is too small for this model or prompt: {take_first_line(error)}",
            "Try --load-in-4bit or a shorter prompt, close other programs that use the GPU, or take --device cpu.",
        ) from error
