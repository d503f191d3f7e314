"""The proof of a merge: the merged model's logits against those of base and adapter as PEFT computes them.

Both models run in float32, one module at a time, so that neither is in memory as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsft.core.errors import MergeError
from dsft.core.models.weight_files import WeightFiles, open_model_weights
from dsft.merge.adapter import Adapter
from dsft.merge.adapter_names import strip_wrappers
from dsft.merge.arithmetic import MergeSource, divide_rows
from dsft.merge.config import FINER_TYPES, OutputDtype
from dsft.merge.peft_control import PeftControl, sum_norms_precisely
from dsft.merge.plan import Recipe, find_stored_name
from dsft.merge.result import Verification
from dsft.merge.shards import VALUE_BYTES
from dsft.merge.streamed_model import ReadRows, Streaming
from dsft.merge.structure import ADAPTER_NAME, Structure, build_empty_model
from dsft.merge.weights import MergedTensor

if TYPE_CHECKING:
    from peft import PeftModel

_UNEXPLAINED_SHARE = 0.1
"""Of what rounding explains, so much may the merged model differ from PEFT's merge rounded to the same type: a sum that
lies between two numbers of the type may fall to either side."""

_NOISE = 2e-5
"""Mean differences below this share of the logits' spread are float32's own; 2e-6 was measured with 30 layers."""

_MAX_NOISE = 50 * _NOISE
"""The same for the greatest difference, and where weights cancel each other."""

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
        config_file: The merged model's config.json, in its folder, whatever it is called there.
        dtype: Type of the merged weights.
        token_ids: Prompts, (samples, tokens).
        on_bytes: Receives the bytes of merged weights that were run, twice those of the whole model in all.
    """

    structure: Structure
    source: MergeSource
    config_file: Path
    dtype: OutputDtype
    token_ids: torch.Tensor
    on_bytes: Callable[[int], None]


def verify(proof: Proof) -> Verification:
    """Compare the logits of base and adapter with those of the merged model.

    The control is PEFT's own merge, rounded to the same type: its difference from the unmerged model is what the type
    explains, and the merged model must not differ from it by more than a fraction of that on average, nor anywhere by
    more than rounding does where it does most.

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
    max_difference = total = rounding = excess = kl_sum = kl_max = same = rounding_max = excess_max = 0.0
    for first in range(0, len(unmerged), _COMPARED_ROWS):
        rows = slice(first, first + _COMPARED_ROWS)
        difference = (merged[rows] - unmerged[rows]).abs()
        max_difference = max(max_difference, float(difference.max()))
        total += float(difference.double().sum())
        explained, unexplained = (control[rows] - unmerged[rows]).abs(), (merged[rows] - control[rows]).abs()
        rounding, rounding_max = rounding + float(explained.double().sum()), max(rounding_max, float(explained.max()))
        excess, excess_max = excess + float(unexplained.double().sum()), max(excess_max, float(unexplained.max()))
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
        rounding_max_difference=rounding_max,
        excess_mean_difference=excess / num_logits,
        excess_max_difference=excess_max,
    )


def _judge(found: Verification, spread: float, dtype: OutputDtype) -> None:
    noise = _NOISE * spread
    mean_limit = _UNEXPLAINED_SHARE * found.rounding_mean_difference + noise
    max_limit = found.rounding_max_difference + _MAX_NOISE * spread
    # Written so that NaN fails.
    if not (found.excess_mean_difference <= mean_limit and found.excess_max_difference <= max_limit):
        raise MergeError(
            "The merged model does not compute what base and adapter do: its logits differ from PEFT's merge by "
            f"{found.excess_mean_difference:.2g} on average and {found.excess_max_difference:.2g} at most, where "
            f"rounding to {dtype} explains {mean_limit:.2g} and {max_limit:.2g}.",
            "Check the disk and memory of this machine, then report this with the adapter_config.json.",
        )
    limit = _MAX_ROUNDING_STEPS * torch.finfo(getattr(torch, dtype)).eps / 2 * spread + _MAX_NOISE * spread
    if not found.mean_difference <= limit:
        raise MergeError(
            f"Rounding to {dtype} changes the logits by {found.mean_difference:.2g} on average, more than the "
            f"{limit:.2g} that rounding of a whole model explains: it loses weights of the base or of the update.",
            FINER_TYPES[dtype],
        )


def _run_unmerged(proof: Proof) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of base and adapter, and those of PEFT's merge rounded to the type."""
    model = proof.structure.adapted.base_model.model
    sum_norms_precisely(model)
    control = PeftControl(len(proof.token_ids), getattr(torch, proof.dtype))
    Streaming(_UnmergedWeights(proof).divide, proof.source.device, control).attach(model)
    logits = model(proof.token_ids.repeat(2, 1).to(proof.source.device), use_cache=False).logits
    unmerged, merged = logits.flatten(0, 1).chunk(2)
    return unmerged, merged


def _run_merged(proof: Proof) -> torch.Tensor:
    model = build_empty_model(proof.config_file)
    folder = proof.config_file.parent
    # As transformers reads it: its config.json says whether the head is the embedding, whatever the files hold.
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    tied = {proof.structure.head: proof.structure.embedding} if is_tied else {}
    with open_model_weights(folder, str(folder)) as weights:

        def divide(name: str) -> tuple[tuple[int, ...], Iterator[ReadRows]]:
            stored = tied.get(name, name)
            shape = weights.shape(stored)
            proof.on_bytes(weights.tensors[stored].num_bytes)
            if not shape:
                return shape, iter([lambda: weights.read(stored).float()])
            return shape, (
                partial(_read_rows, weights, stored, proof.source.device, *bounds)
                for bounds in divide_rows(shape, _PIECE_VALUES)
            )

        Streaming(divide, proof.source.device).attach(model)
        logits: torch.Tensor = model(proof.token_ids.to(proof.source.device), use_cache=False).logits
    return logits.flatten(0, 1)


def _read_rows(weights: WeightFiles, name: str, device: torch.device, first: int, last: int) -> torch.Tensor:
    return weights.read_rows(name, first, last).to(device).float()


class _UnmergedWeights:
    """Finds the tensors of the adapted model in base and adapter.

    Which tensor of the adapter is which weight, PEFT's own loader tells; nothing of the merge's plan is asked but how
    a base tensor is stored.
    """

    def __init__(self, proof: Proof) -> None:
        self._proof = proof
        self._own = _ask_peft(proof.structure.adapted, proof.source.adapter)

    def divide(self, name: str) -> tuple[tuple[int, ...], Iterator[ReadRows]]:
        source, structure = self._proof.source, self._proof.structure
        original = strip_wrappers(name.replace(f"modules_to_save.{ADAPTER_NAME}.", ""))
        own = self._own.get(name)
        if own is None and structure.is_tied and original == structure.head:
            original = structure.embedding
            own = self._find_tied(name)
        if original in structure.shapes:
            self._proof.on_bytes(prod(structure.shapes[original]) * VALUE_BYTES[self._proof.dtype])
        if own is not None:
            return source.adapter.weights.shape(own), iter([partial(source.read_adapter, own)])
        shape = structure.shapes[original]
        stored = find_stored_name(original, source.base.tensors, structure.prefix)
        if stored is None:
            raise ValueError(f"the plan found {original} in the base")
        is_quantized = original in structure.linear_weights
        recipe = Recipe(MergedTensor(original, shape), "base", stored, is_quantized=is_quantized)
        return shape, source.divide_source(recipe)

    def _find_tied(self, name: str) -> str | None:
        """Return the adapter's tensor that a head has from the embedding it is tied to."""
        structure = self._proof.structure
        head, embedding = (f"{name.rpartition('.')[0]}." for name in (structure.head or "", structure.embedding))
        places = (f"{embedding}{name.removeprefix(head)}", f"{embedding}base_layer.weight")
        return next((self._own[place] for place in places if place in self._own), None)


def _ask_peft(adapted: "PeftModel", adapter: Adapter) -> dict[str, str]:
    """Return which tensor of the adapter PEFT loads into which parameter, told by loading empty ones."""
    from peft import set_peft_model_state_dict

    empty = {
        name: torch.nn.Parameter(torch.empty(adapter.weights.shape(name), device="meta"), requires_grad=False)
        for name in adapter.weights.names
    }
    names = {id(parameter): name for name, parameter in empty.items()}
    set_peft_model_state_dict(adapted, dict(empty), ADAPTER_NAME, low_cpu_mem_usage=True)
    parameters = adapted.base_model.model.named_parameters(remove_duplicate=False)
    return {path: names[id(parameter)] for path, parameter in parameters if id(parameter) in names}
