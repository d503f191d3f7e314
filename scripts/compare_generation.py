"""Compare greedy answers of dsft with those of transformers' `generate`, token for token, on one loaded model.

    python scripts/compare_generation.py --model DIR [--adapter DIR] --prompts humaneval.jsonl --num 50 \
        --new-tokens 64 --dtype bfloat16 --device cuda [--load-in-4bit] [--speculate] [--rows 32]

Each line of the file holds a "prompt", which is continued as it is. The reference reads and answers one prompt at a
time; dsft does so too (way "one"), with drafts by prompt lookup (--speculate, way "lookup"), and with several prompts
at once (--rows, way "rows"). Printed is a JSON object: for each way the number of equal answers, and each first
difference with its position, both tokens, and the gap between their logits as the reference computed them; with
--check-float32 also as the same weights give it in float32, negative where they prefer dsft's token.

Passes of another width add in another order, so logits of 16 bits may differ in the last bit, and candidates that are
nearly equal may change places. A difference is a tie if the gap is no larger than what two roundings to the model's
number type can move it: of the last hidden state, the head's input, and of the logits themselves. With the hidden state
h, the head's rows w_a and w_b and the type's relative rounding error u (2^-8 for bfloat16) that is
u * sum(|h * (w_a - w_b)|) plus one spacing of the type at the larger logit.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dsft.core.versions import versions
from dsft.infer.config import InferConfig
from dsft.infer.decoding.decoder import Decoder
from dsft.infer.decoding.loop import generate, generate_with_drafts
from dsft.infer.decoding.make import read_end_token_ids
from dsft.infer.sampling import choose_sampling
from dsft.infer.session import Session

Json = dict[str, Any]
Tokens = list[int]


@dataclass(frozen=True)
class Reference:
    """What transformers answered to a prompt, and the logits each token was chosen from."""

    prompt: Tokens
    answer: Tokens
    logits: list[torch.Tensor]  # float32 [vocab_size] for each token of the answer


@dataclass(frozen=True, eq=False)
class Difference:
    """Where an answer first takes another token than the reference.

    Attributes:
        prompt: Index of the prompt.
        text: Prompt and common tokens before.
        position: Number of common tokens of the answer.
        reference_token: What the reference goes on with.
        token: What the answer goes on with.
        gap: By how much the reference's logit of its own token is larger.
        spacing: Distance of neighbouring numbers of the model's type at the larger of both logits.
        rounding_bound: Largest gap that rounding of the head's input and of the logits explains.
    """

    prompt: int
    text: Tokens
    position: int
    reference_token: int
    token: int
    gap: float
    spacing: float
    rounding_bound: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.gap <= self.rounding_bound


def main() -> None:
    """Load, generate in all ways, compare, print."""
    given = parse_arguments()
    config = InferConfig(
        model=given.adapter or given.model,
        base=given.model if given.adapter else None,
        is_raw=True,
        max_new_tokens=given.new_tokens,
        dtype=given.dtype,
        device=given.device,
        use_4bit=given.load_in_4bit,
    )
    texts = read_prompts(given.prompts, given.num)
    session = Session(config, tell)
    encoded = [session.encode(text) for text in texts]
    prompts = [prompt.token_ids for prompt in encoded]
    decoder, model = session.load(), session.model
    stops = {*encoded[0].stop_token_ids, *read_end_token_ids(model)}
    answers, seconds = {}, {}
    for name, answer_all in choose_ways(decoder, config, stops, given).items():
        started_s = time.perf_counter()
        answers[name] = answer_all(prompts)
        seconds[name] = time.perf_counter() - started_s
        tell(f"{name}: {sum(map(len, answers[name]))} tokens in {seconds[name]:.1f} s")
    found = compare(model, prompts, answers, given.new_tokens, stops)
    gaps = find_float32_gaps(config, found) if given.check_float32 else {}
    print(json.dumps(make_record(given, decoder, seconds, found, gaps), indent=1))


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, or the base of --adapter")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--speculate", action="store_true", help="compare answers with drafts too")
    parser.add_argument("--rows", type=int, help="compare answers to this many prompts at once too")
    parser.add_argument("--skip-one", action="store_true", help="leave answers to one prompt at a time out")
    parser.add_argument("--check-float32", action="store_true", help="compute the gaps in float32 too")
    given = parser.parse_args()
    if given.skip_one and not given.speculate and given.rows is None:
        parser.error("--skip-one leaves nothing to compare")
    if given.check_float32 and given.load_in_4bit:
        parser.error("--check-float32 needs a model that is not quantized")
    return given


def read_prompts(path: Path, num_prompts: int) -> list[str]:
    """Return the first prompts of a file."""
    with path.open(encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line, _ in zip(file, range(num_prompts), strict=False)]
    if len(prompts) < num_prompts:
        raise SystemExit(f"{path} has {len(prompts)} prompts, and --num asks for {num_prompts}")
    return prompts


def tell(text: str) -> None:
    """Write a line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


# Generation


def choose_ways(
    decoder: Decoder, config: InferConfig, stops: set[int], given: argparse.Namespace
) -> dict[str, Callable[[Sequence[Tokens]], list[Tokens]]]:
    """Return the ways to generate by name; each takes prompts and returns the answers' tokens."""
    sampling = choose_sampling(config)

    def generate_rows(prompts: Sequence[Tokens]) -> list[Tokens]:
        answers: list[Tokens] = [[] for _ in prompts]

        def receive(row: int, token_id: int) -> bool:
            answers[row].append(token_id)
            return token_id in stops

        # What an earlier prompt has in common would be kept, and the rest be read in a pass of another width.
        decoder.reset()
        generate(decoder, prompts, [config.max_new_tokens] * len(prompts), sampling, receive)
        return answers

    def look_up(prompt: Tokens) -> Tokens:
        answer: Tokens = []

        def receive(token_id: int) -> bool:
            answer.append(token_id)
            return token_id in stops

        decoder.reset()
        generate_with_drafts(decoder, prompt, config.max_new_tokens, sampling, receive)
        return answer

    def generate_groups(prompts: Sequence[Tokens]) -> list[Tokens]:
        size = min(given.rows, decoder.max_rows)
        return [each for start in range(0, len(prompts), size) for each in generate_rows(prompts[start : start + size])]

    ways: dict[str, Callable[[Sequence[Tokens]], list[Tokens]]] = {}
    if not given.skip_one:
        ways["one"] = lambda prompts: [generate_rows([prompt])[0] for prompt in prompts]
    if given.speculate:
        ways["lookup"] = lambda prompts: [look_up(prompt) for prompt in prompts]
    if given.rows is not None:
        ways["rows"] = generate_groups
    return ways


def generate_reference(model: Any, prompt: Tokens, max_new_tokens: int, stops: set[int]) -> Reference:
    """Answer one prompt with transformers."""
    input_ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stops),
        pad_token_id=min(stops),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Reference(prompt, output.sequences[0, len(prompt) :].tolist(), [row[0].float() for row in output.logits])


# Comparison


def compare(
    model: Any, prompts: Sequence[Tokens], answers: dict[str, list[Tokens]], max_new_tokens: int, stops: set[int]
) -> dict[str, list[Difference]]:
    """Answer each prompt with transformers and return the first differences of each way."""
    model.generation_config = GenerationConfig()  # the model's own sampling settings do not count
    found: dict[str, list[Difference]] = {name: [] for name in answers}
    started_s = time.perf_counter()
    for index, prompt in enumerate(prompts):
        reference = generate_reference(model, prompt, max_new_tokens, stops)
        for name, differences in found.items():
            differences.extend(find_difference(model, index, reference, answers[name][index]))
    tell(f"reference and comparison: {time.perf_counter() - started_s:.1f} s")
    return found


def find_difference(model: Any, index: int, reference: Reference, answer: Tokens) -> Iterator[Difference]:
    """Yield where an answer first differs from the reference, if it does.

    Raises:
        SystemExit: One is the beginning of the other: it ended where nothing ends an answer.
    """
    if answer == reference.answer:
        return
    pairs = zip(reference.answer, answer, strict=False)
    position = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if position is None:
        raise SystemExit(f"prompt {index}: {len(answer)} tokens, and the reference has {len(reference.answer)}")
    text = reference.prompt + reference.answer[:position]
    expected, chosen = reference.answer[position], answer[position]
    logits = reference.logits[position][[expected, chosen]]
    spacing = measure_spacing(logits.abs().max().item(), model.dtype)
    bound = bound_hidden_rounding(model, text, expected, chosen) + spacing
    gap = (logits[0] - logits[1]).item()
    yield Difference(index, text, position, expected, chosen, gap, spacing, bound)


def measure_spacing(magnitude: float, dtype: torch.dtype) -> float:
    """Return the distance of neighbouring numbers of a type at a magnitude."""
    limits = torch.finfo(dtype)
    return float(limits.eps * 2.0 ** math.floor(math.log2(max(magnitude, limits.tiny))))


@torch.no_grad()
def bound_hidden_rounding(model: Any, text: Tokens, one: int, other: int) -> float:
    """Return how far one rounding of the head's input can move the gap between two tokens' logits after a text."""
    head = model.get_output_embeddings()
    inputs: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        read_logits(model, text)
    finally:
        handle.remove()
    difference = head.weight[one].double() - head.weight[other].double()
    return torch.finfo(model.dtype).eps / 2 * (inputs[0][0, -1].double() * difference).abs().sum().item()


@torch.no_grad()
def read_logits(model: Any, text: Tokens) -> torch.Tensor:
    """Return the logits after a text, read in one pass."""
    output = model(input_ids=torch.tensor([text], device=model.device), use_cache=False, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1]
    return logits


def find_float32_gaps(config: InferConfig, found: dict[str, list[Difference]]) -> dict[Difference, float]:
    """Return the gaps that the same weights give in float32."""
    model = Session(replace(config, dtype="float32"), tell).model
    gaps = {}
    for difference in (each for differences in found.values() for each in differences):
        logits = read_logits(model, difference.text)
        gaps[difference] = (logits[difference.reference_token] - logits[difference.token]).item()
    return gaps


def make_record(
    given: argparse.Namespace,
    decoder: Decoder,
    seconds: dict[str, float],
    found: dict[str, list[Difference]],
    float32_gaps: dict[Difference, float],
) -> Json:
    """Return what is printed."""
    settings = ("num", "new_tokens", "dtype", "device", "load_in_4bit", "rows")
    return {
        "versions": versions(),
        "settings": {name: getattr(given, name) for name in settings} | {"has_adapter": given.adapter is not None},
        "decoder": type(decoder).__name__,
        "ways": {
            name: {
                "num_equal": given.num - len(differences),
                "num_ties": sum(each.is_tie for each in differences),
                "num_other": sum(not each.is_tie for each in differences),
                "duration_s": round(seconds[name], 2),
                "differences": [describe(each, float32_gaps) for each in differences],
            }
            for name, differences in found.items()
        },
    }


def describe(difference: Difference, float32_gaps: dict[Difference, float]) -> Json:
    """Return a difference as it is printed, its sizes in spacings of the model's type."""
    sizes = {"gap": difference.gap, "rounding_bound": difference.rounding_bound}
    if difference in float32_gaps:
        sizes["float32_gap"] = float32_gaps[difference]
    return {
        "prompt": difference.prompt,
        "position": difference.position,
        "reference_token": difference.reference_token,
        "token": difference.token,
        "spacing": difference.spacing,
        **{f"{name}_in_spacings": round(size / difference.spacing, 3) for name, size in sizes.items()},
        "is_tie": difference.is_tie,
    }


if __name__ == "__main__":
    main()
