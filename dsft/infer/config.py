"""Which model is asked and how it answers, checked as a whole; knows no model and no screen."""

from collections.abc import Iterator
from dataclasses import dataclass

from dsft.core.config.schema import TemplateChoice
from dsft.core.errors import ConfigError, InputError
from dsft.core.models.device import DeviceChoice
from dsft.infer.dtype import DtypeChoice

DEFAULT_MAX_NEW_TOKENS = 512

# Beyond these, one token has all probability or all have the same, and float32 overflows far out.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.001, 100
_LEAST_PENALTY, _MOST_PENALTY = 0.01, 100


@dataclass(frozen=True)
class InferConfig:
    """Which model answers, and how.

    Attributes:
        model: Adapter folder, model folder, hub id or `builtin:` name; None is the newest run in `./trained_*`.
        base: Base model of an adapter, instead of the recorded one.
        template: Prompt template; auto is the recorded one, else it is chosen by the tokenizer.
        is_raw: Give the prompt to the model as it is.
        system: System text, for templates that have one.
        max_new_tokens: Most tokens to generate.
        temperature: Divides the logits before sampling; None or 0 takes the likeliest token each time, unless top_p
            or top_k ask for sampling.
        top_p: Sample from the likeliest tokens that together have this probability.
        top_k: Sample from this many likeliest tokens.
        repetition_penalty: Logits of tokens seen before are divided (negative ones multiplied) by it (CTRL,
            arXiv:1909.05858, section 4.1); 1 is off.
        seed: Seed of the sampling; None draws one.
        stop: Texts that end the answer; they are no part of it.
        dtype: Type of weights and arithmetic.
        use_4bit: Quantize the linear layers to NF4 while loading.
        is_speculating: Check drafts taken from the text itself, several tokens a pass; the answer stays the same.
        device: Where to compute.

    Raises:
        ConfigError: Settings out of range or in contradiction, all of them at once.
        InputError: The system text is no text.
    """

    model: str | None = None
    base: str | None = None
    template: TemplateChoice = "auto"
    is_raw: bool = False
    system: str | None = None
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    dtype: DtypeChoice = "auto"
    use_4bit: bool = False
    is_speculating: bool = False
    device: DeviceChoice = "auto"

    def __post_init__(self) -> None:
        wrong, clashes = list(self._find_wrong()), list(self._find_clashes())
        if wrong or clashes:
            fixes = ["`dsft infer --help` lists what each option takes."] if wrong else []
            if clashes:
                fixes.append("Leave out one of two that contradict." if wrong else "Leave one of them out.")
            raise ConfigError(" ".join([*wrong, *clashes]), " ".join(fixes))
        check_text(self.system or "", "The system text")

    @property
    def is_sampling(self) -> bool:
        """Whether tokens are drawn at random."""
        if self.temperature is None:
            return self.top_p is not None or self.top_k is not None
        return self.temperature > 0

    def _find_wrong(self) -> Iterator[str]:
        limits = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "--temperature",
                self.temperature,
                not self.temperature or _LEAST_TEMPERATURE <= self.temperature <= _MOST_TEMPERATURE,
                f"0 or from {_LEAST_TEMPERATURE} to {_MOST_TEMPERATURE}",
            ),
            ("--top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            (
                "--repetition-penalty",
                self.repetition_penalty,
                _LEAST_PENALTY <= self.repetition_penalty <= _MOST_PENALTY,
                f"from {_LEAST_PENALTY} to {_MOST_PENALTY}",
            ),
            ("--seed", self.seed, self.seed is None or 0 <= self.seed < 2**32, "from 0 to 4294967295"),
        )
        for flag, value, is_right, requirement in limits:
            if not is_right:
                yield f"{flag} is {value}, but must be {requirement}."
        if "" in self.stop:
            yield "--stop is empty, but must be a text."

    def _find_clashes(self) -> Iterator[str]:
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            yield "--top-p and --top-k sample, but --temperature 0 asks for the likeliest token each time."
        if self.is_raw and self.template != "auto":
            yield f"--raw asks for no template, but --template {self.template} for one."
        if self.is_raw and self.system is not None:
            yield "--raw asks for no template, so there is no place for the text of --system."


def check_text(text: str, name: str) -> None:
    """Refuse a text that no tokenizer takes.

    Raises:
        InputError: It holds lone surrogates.
    """
    # Bytes of the command line that are no UTF-8 reach Python as lone surrogates, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not valid UTF-8 at character {error.start + 1}.", "Give it in the UTF-8 encoding."
        ) from None
