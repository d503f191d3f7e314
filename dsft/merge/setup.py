"""Everything a merge decides before it writes: what is merged into what, how each tensor is made, where it goes."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.core.errors import ModelError
from dsft.core.models.device import resolve_device
from dsft.core.models.find_run import ModelChoice, choose_model
from dsft.core.models.tokenizer import LoadedTokenizer
from dsft.core.models.weight_files import open_model_weights
from dsft.core.signals import held_signals
from dsft.merge.base import (
    Base,
    FoundBase,
    fetch_small_files,
    fetch_weights,
    find_matching_base,
    load_matching_tokenizer,
)
from dsft.merge.config import MergeConfig
from dsft.merge.events import EventSink, Notice
from dsft.merge.target import check_room, find_target

if TYPE_CHECKING:
    import torch

    from dsft.core.data.prompts import PromptTemplate
    from dsft.core.models.weight_files import WeightFiles
    from dsft.merge.adapter import Adapter
    from dsft.merge.adapter_names import AdapterNames
    from dsft.merge.arithmetic import MergeSource
    from dsft.merge.gguf.plan import GgufPlan
    from dsft.merge.shards import ShardLayout
    from dsft.merge.structure import Structure


@dataclass(frozen=True)
class MergeSetup:
    """What a merge will do.

    Attributes:
        config: What was asked for.
        choice: The adapter and what its run recorded.
        adapter_dir: The adapter's folder.
        base: The base model.
        target: Folder of the merged model.
        tokenizer: The adapter's, or the base's.
        template: Prompt template of the run; None where none is recorded.
        stop_token_ids: The tokens that end an answer.
        chat_template: Jinja template for other programs; None where there is none.
        structure: The base model and where the adapter changes it.
        source: Makes the merged tensors.
        layout: Their files.
        model_config: Content of the merged model's config.json.
        gguf: The GGUF file; None where none was asked for.
    """

    config: MergeConfig
    choice: ModelChoice
    adapter_dir: Path
    base: Base
    target: Path
    tokenizer: LoadedTokenizer
    template: "PromptTemplate | None"
    stop_token_ids: list[int]
    chat_template: str | None
    structure: "Structure"
    source: "MergeSource"
    layout: "ShardLayout"
    model_config: dict[str, Any]
    gguf: "GgufPlan | None"

    @property
    def run_bytes(self) -> int:
        """Bytes of the weights that one pass through the merged model reads: a tied embedding is read as head too."""
        plan = self.source.plan
        tied = [
            recipe.tensor for recipe in plan.recipes if plan.is_tied and recipe.tensor.name == self.structure.embedding
        ]
        return self.layout.num_bytes + sum(self.layout.tensor_bytes(tensor) for tensor in tied)


@contextmanager
def prepared(config: MergeConfig, sink: EventSink) -> Iterator[MergeSetup]:
    """Decide all of a merge, and hold the base model's files open; writes nothing.

    Raises:
        InputError: Adapter, base or output folder can't be used, or the adapter can't be merged exactly.
        MergeError: The adapter holds NaN or infinite numbers.
        WriteError: There is too little room.
        NoGpuError: A GPU was demanded and there is none.
    """
    choice = choose_model(config.adapter, config.base, Path())
    if choice.adapter_dir is None:
        if not Path(choice.name).expanduser().exists():
            raise ModelError(f"There is no folder {choice.name}.", "Give the folder that `dsft train` saved.")
        raise ModelError(
            f"{choice.name} is no adapter (it has no adapter_config.json).", "Give the folder that `dsft train` saved."
        )
    if config.adapter is None:
        sink(Notice(f"Adapter: {choice.name}, the newest finished run."))
    found = find_matching_base(config, choice)
    if config.base is None and found.name is not choice.bases[0]:
        sink(Notice(f"The base model {choice.bases[0].name} is not there; taking {found.name.name}."))
    local = Path(found.source.location) if found.source.is_local else None
    target = find_target(choice.adapter_dir, config.output, local, overwrite=config.overwrite)
    with held_signals():
        # Not all is needed here yet, but imports are not to be interrupted.
        import bitsandbytes  # noqa: F401
        from peft import PeftModel  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

        from dsft.merge.adapter import open_adapter
    adapter = open_adapter(choice.adapter_dir)
    with closing(adapter.weights):
        parts = _fit_together(config, choice, adapter, found)
        fetch_weights(parts.base)
        with open_model_weights(parts.base.folder, parts.base.source.name) as weights:
            setup = _decide(config, choice, target, adapter, parts, weights)
            for text in _find_notices(setup):
                sink(Notice(text))
            yield setup


@dataclass(frozen=True)
class _Parts:
    """What is known of a merge without the base's weights."""

    device: "torch.device"
    base: Base
    tokenizer: LoadedTokenizer
    names: "AdapterNames"
    structure: "Structure"
    template: "PromptTemplate | None"


def _fit_together(config: MergeConfig, choice: ModelChoice, adapter: "Adapter", found: FoundBase) -> _Parts:
    """Decide what can be decided without the base's weights, which may have to be downloaded."""
    import torch

    from dsft.core.data.prompts import get_template
    from dsft.merge.adapter_names import check_names, sort_names
    from dsft.merge.arithmetic import check_finite
    from dsft.merge.structure import read_structure

    device = torch.device(resolve_device(config.device).kind)
    names = sort_names(adapter)
    check_finite(adapter)
    base = fetch_small_files(found)
    tokenizer = load_matching_tokenizer(choice, base)
    replaced_shapes = {name: adapter.weights.shape(full) for name, full in names.replaced.items()}
    structure = read_structure(base.folder, adapter.config, replaced_shapes)
    check_names(names, structure, adapter, base.source.name)
    if config.base_rounding == "nf4":
        _check_quantizable(structure)
    template = None if choice.template is None else get_template(choice.template, tokenizer.tokenizer)
    return _Parts(device, base, tokenizer, names, structure, template)


def _decide(
    config: MergeConfig, choice: ModelChoice, target: Path, adapter: "Adapter", parts: _Parts, weights: "WeightFiles"
) -> MergeSetup:
    from dsft.merge.arithmetic import MergeSource
    from dsft.merge.folder import choose_chat_template, make_model_config
    from dsft.merge.plan import plan_merge
    from dsft.merge.shards import lay_out

    base, structure, template, tokenizer = parts.base, parts.structure, parts.template, parts.tokenizer
    plan = plan_merge(structure, adapter, parts.names, weights, base.source.name)
    _check_vocabulary(tokenizer, plan.vocab_size)
    nf4_dtype = _compute_dtype(choice) if config.base_rounding == "nf4" else None
    source = MergeSource(plan, weights, adapter, parts.device, nf4_dtype)
    layout = lay_out(source.tensors, config.dtype)
    model_config = make_model_config(base.source.model_config, structure.architecture, plan, config.dtype)
    chat_template = choose_chat_template(template, tokenizer.tokenizer)
    end_id = tokenizer.tokenizer.eos_token_id
    stop_token_ids = [int(end_id)] if template is None else list(template.stop_token_ids)
    gguf = None
    if config.gguf is not None:
        from dsft.merge.gguf.plan import plan_gguf

        gguf = plan_gguf(
            config.gguf,
            source.tensors,
            model_config,
            tokenizer.tokenizer,
            name=adapter.folder.resolve().name,
            stop_token_ids=stop_token_ids,
            chat_template=chat_template,
        )
    check_room(target, layout.num_bytes + (0 if gguf is None else gguf.most_file_bytes))
    return MergeSetup(
        config=config,
        choice=choice,
        adapter_dir=adapter.folder,
        base=base,
        target=target,
        tokenizer=tokenizer,
        template=template,
        stop_token_ids=stop_token_ids,
        chat_template=chat_template,
        structure=structure,
        source=source,
        layout=layout,
        model_config=model_config,
        gguf=gguf,
    )


def _find_notices(setup: MergeSetup) -> Iterator[str]:
    choice = setup.choice
    if setup.chat_template is None and choice.template not in (None, "fim", "text"):
        yield f"No chat template is written: none gives the ids that the prompt template {choice.template} gave."
    if setup.config.base_rounding == "nf4" and choice.precision is None:
        yield "The run does not record the type it computed in; the NF4 round trip is that of bfloat16."
    if setup.config.base_rounding == "nf4":
        yield "Do not load the merged model in 4 bits: quantizing takes weights near NF4's levels back onto them."
    if setup.gguf is not None:
        yield from setup.gguf.notices


def _check_vocabulary(tokenizer: LoadedTokenizer, vocab_size: int) -> None:
    last = max(tokenizer.tokenizer.get_vocab().values())
    if last >= vocab_size:
        raise ModelError(
            f"The tokenizer has a token {last}, and the merged model only {vocab_size} tokens.",
            "Give the model the adapter was trained on with --base, and the tokenizer it was trained with.",
        )


def _check_quantizable(structure: "Structure") -> None:
    """Refuse to round a base to NF4 as training did where training would not have rounded what the adapter changes."""
    head = (structure.head or "").rpartition(".")[0]
    for path, site in structure.sites.items():
        if not site.is_embedding and path != head and f"{path}.weight" not in structure.linear_weights:
            raise ModelError(
                f"--base-rounding nf4 was given, but {path} is no layer that dsft trains in NF4.", "Leave it out."
            )


def _compute_dtype(choice: ModelChoice) -> "torch.dtype":
    import torch

    # A run that chose by itself took bfloat16 on every GPU that has it.
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choice.precision or "bf16"]
