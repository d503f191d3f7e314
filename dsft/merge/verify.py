"""The proof of a merge: the merged model's logits against those of base and adapter as PEFT computes them.

Both models run in float32, one module at a time, so that neither is in memory as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch

from dsft.core.errors import MergeError
from dsft.core.models.weight_files import WeightFiles, open_model_weights
from dsft.merge.adapter import Adapter
from dsft.merge.adapter_names import strip_wrappers
from dsft.merge.arithmetic import MergeSource, divide_rows
from dsft.merge.config import OutputDtype
from dsft.merge.peft_control import PeftControl
from dsft.merge.plan import Recipe
from dsft.merge.result import Verification
from dsft.merge.streamed_model import ReadRows, Streaming
from dsft.merge.structure import ADAPTER_NAME, Structure, build_empty_model

_UNEXPLAINED_SHARE = 0.1
"""Of what rounding explains, so much may the merged model differ from PEFT's merge rounded to the same type: a sum that
lies between two numbers of the type may fall to either side."""

_NOISE = 1e-4
"""Differences below this share of the logits' spread are float32's own."""

_MAX_ROUNDING_STEPS = 40
"""Rounding errors, relative to the logits' spread and in units of the type's, grow to 1 or 2 in trained models of 30
layers; far beyond that the update itself is lost in rounding."""

_COMPARED_ROWS = 64
_PIECE_VALUES = 2**20


@dataclass(frozen=True)
class Proof:
    """What is compared.

    Attributes:
        structure: The base model and where the adapter changes it; its `adapted` model is used up.
        source: Base and adapter.
        folder: The merged model with its config.json.
        dtype: Type of the merged weights.
        token_ids: Prompts, (samples, tokens).
        on_bytes: Receives the bytes of merged weights that were run, twice those of the whole model in all.
    """

    structure: Structure
    source: MergeSource
    folder: Path
    dtype: OutputDtype
    token_ids: torch.Tensor
    on_bytes: Callable[[int], None]


def verify(proof: Proof) -> Verification:
    """Compare the logits of base and adapter with those of the merged model.

    The control is PEFT's own merge, rounded to the same type: its difference from the unmerged model is what the type
    explains, and the merged model must not differ from it by more than a fraction of that.

    Returns:
        All differences.

    Raises:
        MergeError: The merged model computes something else, or rounding loses the update.
    """
    with torch.inference_mode():
        unmerged, control = _run_unmerged(proof)
        merged = _run_merged(proof)
        found = compare(unmerged, control, merged)
        spread = float(unmerged.std())
    _judge(found, spread, proof.dtype)
    return found


def compare(unmerged: torch.Tensor, control: torch.Tensor, merged: torch.Tensor) -> Verification:
    """Compare logits in float32, (positions, vocabulary) each."""
    max_difference = total = rounding = excess = kl_sum = kl_max = same = 0.0
    for first in range(0, len(unmerged), _COMPARED_ROWS):
        rows = slice(first, first + _COMPARED_ROWS)
        difference = (merged[rows] - unmerged[rows]).abs()
        max_difference = max(max_difference, float(difference.max()))
        total += float(difference.double().sum())
        rounding += float((control[rows] - unmerged[rows]).abs().double().sum())
        excess += float((merged[rows] - control[rows]).abs().double().sum())
        expected = torch.log_softmax(unmerged[rows].double(), dim=-1)
        kl = (expected.exp() * (expected - torch.log_softmax(merged[rows].double(), dim=-1))).sum(dim=-1)
        kl_sum += float(kl.sum())
        kl_max = max(kl_max, float(kl.max()))
        same += float((unmerged[rows].argmax(dim=-1) == merged[rows].argmax(dim=-1)).sum())
    num_tokens, num_logits = len(unmerged), unmerged.numel()
    return Verification(
        num_tokens=num_tokens,
        max_difference=max_difference,
        mean_difference=total / num_logits,
        mean_kl=kl_sum / num_tokens,
        max_kl=kl_max,
        top_token_agreement=same / num_tokens,
        rounding_mean_difference=rounding / num_logits,
        excess_mean_difference=excess / num_logits,
    )


def _judge(found: Verification, spread: float, dtype: OutputDtype) -> None:
    noise = _NOISE * spread
    # Written so that NaN fails.
    if not found.excess_mean_difference <= _UNEXPLAINED_SHARE * found.rounding_mean_difference + noise:
        raise MergeError(
            f"The merged model does not compute what base and adapter do: its logits differ by "
            f"{found.excess_mean_difference:.2g} on average from PEFT's merge, of which rounding to {dtype} explains "
            f"{_UNEXPLAINED_SHARE * found.rounding_mean_difference:.2g}.",
            "Check the disk and memory of this machine, then report this with the adapter_config.json.",
        )
    limit = _MAX_ROUNDING_STEPS * torch.finfo(getattr(torch, dtype)).eps / 2 * spread + noise
    if not found.mean_difference <= limit:
        raise MergeError(
            f"Rounding to {dtype} changes the logits by {found.mean_difference:.2g} on average, more than the "
            f"{limit:.2g} that rounding of a whole model explains: the adapter's update is too small for this type.",
            "Take --dtype float32 (or float16, which is finer than bfloat16), or use the adapter unmerged.",
        )


def _run_unmerged(proof: Proof) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of base and adapter, and those of PEFT's merge rounded to the type."""
    model = proof.structure.adapted.base_model.model
    control = PeftControl(len(proof.token_ids), getattr(torch, proof.dtype))
    Streaming(_UnmergedWeights(proof).divide, proof.source.device, control).attach(model)
    logits = model(proof.token_ids.repeat(2, 1).to(proof.source.device), use_cache=False).logits
    unmerged, merged = logits.flatten(0, 1).chunk(2)
    return unmerged, merged


def _run_merged(proof: Proof) -> torch.Tensor:
    model = build_empty_model(proof.folder)
    # As transformers reads it: its config.json says whether the head is the embedding, whatever the files hold.
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    tied = {proof.structure.head: proof.structure.embedding} if is_tied else {}
    with open_model_weights(proof.folder, str(proof.folder)) as weights:

        def divide(name: str) -> tuple[tuple[int, ...], Iterator[ReadRows]]:
            stored = tied.get(name, name)
            shape = weights.shape(stored)
            proof.on_bytes(weights.tensors[stored].num_bytes)
            if not shape:
                return shape, iter([lambda: weights.read(stored).float()])
            return shape, (
                partial(_read_rows, weights, stored, *bounds) for bounds in divide_rows(shape, _PIECE_VALUES)
            )

        Streaming(divide, proof.source.device).attach(model)
        logits: torch.Tensor = model(proof.token_ids.to(proof.source.device), use_cache=False).logits
    return logits.flatten(0, 1)


def _read_rows(weights: WeightFiles, name: str, first: int, last: int) -> torch.Tensor:
    return weights.read_rows(name, first, last).float()


class _UnmergedWeights:
    """Finds the tensors of the adapted model in base and adapter by the names they have in it."""

    def __init__(self, proof: Proof) -> None:
        self._proof = proof
        self._adapter: Adapter = proof.source.adapter
        self._recipes: dict[str, Recipe] = {recipe.tensor.name: recipe for recipe in proof.source.plan.recipes}
        structure = proof.structure
        if structure.head is not None and structure.head not in self._recipes:
            self._recipes[structure.head] = self._recipes[structure.embedding]

    def divide(self, name: str) -> tuple[tuple[int, ...], Iterator[ReadRows]]:
        source = self._proof.source
        own = self._find_own(name)
        if own is not None:
            return self._adapter.weights.shape(own), iter([partial(source.read_adapter, own)])
        recipe = self._recipes[_base_name(name)]
        self._proof.on_bytes(prod(recipe.tensor.shape) * _VALUE_BYTES[self._proof.dtype])
        return recipe.tensor.shape, source.divide_source(recipe)

    def _find_own(self, name: str) -> str | None:
        if "lora_" not in name and "trainable_tokens" not in name:
            return None
        structure = self._proof.structure
        saved = name.replace(f".{ADAPTER_NAME}", "")
        candidates = [saved, saved.removesuffix(".weight")]
        if structure.is_tied and structure.head is not None:
            # What a tied head shares with the embedding is saved once.
            head, embedding = (f"{weight.removesuffix('weight')}" for weight in (structure.head, structure.embedding))
            candidates.append(f"{embedding}{saved.removeprefix(head)}")
        full = (f"base_model.model.{each}" for each in candidates)
        return next((each for each in full if each in self._adapter.weights.names), None)


_VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def _base_name(name: str) -> str:
    return strip_wrappers(name.replace(f"modules_to_save.{ADAPTER_NAME}.", ""))
