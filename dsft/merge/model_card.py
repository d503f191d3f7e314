"""The README.md of a merged model: what it is, how it is used, how it was merged and checked. Writes no file."""

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from dsft.core.data.example_question import example_question
from dsft.core.markdown import format_code, format_generation, format_literal, format_table, is_hub_id
from dsft.core.models.find_run import MERGED_FOLDER
from dsft.core.units import format_count
from dsft.merge.result import MergeResult, Verification

_NO_MODEL_NAME = re.compile(r"[^a-z0-9_.-]+")


def render_merged_card(
    result: MergeResult,
    *,
    training: Mapping[str, Any] | None = None,
    chat_template_note: str = "",
    versions: Mapping[str, str] | None = None,
) -> str:
    """Return the card as Markdown with a YAML front matter, as the model hub reads it.

    Args:
        result: What the merge did.
        training: Content of the adapter's `training_summary.json`; None where there is none.
        chat_template_note: A sentence about the chat template in the folder, for those who serve the model.
        versions: What the model was merged with, by package.
    """
    blocks = [
        _front_matter(result, training or {}),
        f"# {_title(result)}",
        f"{_code_name(result.base)} with the LoRA adapter {_code_name(result.adapter)} merged into its weights by dsft "
        f"{result.dsft_version}: a whole model, for which neither dsft nor PEFT is needed.",
        "## Use",
        *_usage(result, training or {}, chat_template_note),
        "## Merge",
        format_table(_merge_rows(result)),
        *_verification_blocks(result),
    ]
    training_rows = _training_rows(training or {})
    if training_rows:
        blocks += ["## Training of the adapter", format_table(training_rows)]
    if versions:
        blocks.append("Merged with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return "\n\n".join(blocks) + "\n"


def describe_verification(verification: Verification, dtype: str) -> list[tuple[str, str]]:
    """Return the figures of a verification, each with its name.

    Args:
        verification: The figures.
        dtype: Type of the merged weights.
    """
    num_same = round(verification.top_token_agreement * verification.num_tokens)
    return [
        (
            "Difference of a logit",
            f"mean {verification.mean_difference:.3g}, greatest {verification.max_difference:.3g}",
        ),
        ("KL divergence", f"mean {verification.mean_kl:.3g} nats, greatest {verification.max_kl:.3g}"),
        (
            "Same likeliest token",
            f"at {format_count(num_same)} of {format_count(verification.num_tokens)} positions",
        ),
        (
            "Explained by rounding",
            f"mean {verification.rounding_mean_difference:.3g}: so much PEFT's own merge differs, rounded to {dtype}",
        ),
        ("Not explained", f"mean {verification.excess_mean_difference:.3g}: between that merge and this model"),
    ]


def suggest_ollama_name(result: MergeResult) -> str:
    """Return a name for the model in Ollama, made of its folder's."""
    name = _NO_MODEL_NAME.sub("-", _title(result).lower()).strip("-.")
    return name or "merged"


def _title(result: MergeResult) -> str:
    """Return the name of the output folder, or of the adapter's where that is the default one inside it."""
    folder = PurePath(result.output)
    named = folder.parent if folder.name == MERGED_FOLDER and folder.parent.name else folder
    return named.name or MERGED_FOLDER


def _front_matter(result: MergeResult, training: Mapping[str, Any]) -> str:
    import yaml

    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "merged", "dsft"],
    }
    if is_hub_id(result.base):
        fields |= {"base_model": result.base, "base_model_relation": "finetune"}
    dataset = _find(training, "config", "dataset")
    if is_hub_id(dataset):
        fields["datasets"] = [dataset]
    return f"---\n{yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)}---"


def _usage(result: MergeResult, training: Mapping[str, Any], chat_template_note: str) -> list[str]:
    folder = _without_root(result.output)
    template = f", which knows the prompt template (`{result.template}`) from this folder" if result.template else ""
    question = shlex.quote(example_question(result.template))
    blocks = [
        f"With dsft{template}:",
        f"```sh\ndsft infer {question} --model {shlex.quote(folder)}\n```",
        "With transformers:",
        f"```python\n{_snippet(folder, result.template, _find(training, 'example_prompt'))}\n```",
        "With vLLM:",
        f"```sh\nvllm serve {shlex.quote(folder)}\n```",
    ]
    if chat_template_note:
        blocks.append(chat_template_note)
    if result.gguf is not None:
        name, modelfile = suggest_ollama_name(result), shlex.quote(f"{folder}/Modelfile")
        blocks += [
            f"With Ollama, from {format_code(result.gguf)} and the `Modelfile` beside it:",
            f"```sh\nollama create {name} -f {modelfile}\nollama run {name}\n```",
        ]
    return blocks


def _snippet(folder: str, template: str | None, example_prompt: object) -> str:
    is_written = isinstance(example_prompt, str)
    prompt = str(example_prompt) if is_written else example_question(template)
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(
    {format_literal(folder)},
    dtype="auto",
    device_map="auto",
)
tokenizer = AutoTokenizer.from_pretrained({format_literal(folder)})

{format_generation(prompt, has_special_tokens=is_written)}"""


def _merge_rows(result: MergeResult) -> list[tuple[str, str]]:
    revision = f" at {format_code(result.base_revision)}" if result.base_revision else ""
    rounding = "rounded to NF4 and back, as training computed with it" if result.base_rounding == "nf4" else "as stored"
    rows = [
        ("Base model", f"{_code_name(result.base)}{revision}, {rounding}"),
        ("Fingerprint of its weights", format_code(result.base_fingerprint)),
        ("Adapter", f"{_code_name(result.adapter)}; it changes {format_count(result.num_updated_tensors)} tensors"),
        (
            "Weights",
            f"{format_count(result.num_parameters)}, summed in float32 and rounded once to {result.dtype}",
        ),
    ]
    if result.update_kept is not None:
        rows.append(("Left of the update after rounding", f"{result.update_kept * 100:.1f} %"))
    if result.gguf is not None:
        rows.append(("GGUF", f"{format_code(result.gguf)}, {result.gguf_type}"))
    return rows


def _verification_blocks(result: MergeResult) -> list[str]:
    if result.verification is None:
        return ["The merged model was not compared with base and adapter (`--no-verify`)."]
    return [
        "Logits of the merged model against those of base and adapter, as PEFT computes them in float32:",
        format_table(describe_verification(result.verification, result.dtype)),
    ]


def _training_rows(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    dataset = _find(training, "config", "dataset")
    if isinstance(dataset, str):
        rows.append(("Data", _code_name(dataset)))
    rank, alpha = _find(training, "config", "lora_r"), _find(training, "config", "lora_alpha")
    if rank is not None and alpha is not None:
        rows.append(("LoRA", f"rank {rank}, alpha {alpha:g}"))
    num_steps, num_epochs = _find(training, "num_steps"), _find(training, "num_epochs")
    if num_steps is not None and num_epochs is not None:
        rows.append(("Steps", f"{format_count(num_steps)} ({num_epochs:.3g} epochs)"))
    best, step = _find(training, "best_validation_loss"), _find(training, "best_step")
    if best is not None:
        rows.append(("Best validation loss", f"{best:.4f} at step {step}"))
    return rows


def _find(training: Mapping[str, Any], *keys: str) -> Any:
    """Return what a summary holds under nested keys, None where an older version's holds nothing."""
    value: Any = training
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _code_name(name: str) -> str:
    return format_code(_without_root(name))


def _without_root(name: str) -> str:
    """Return a path that starts at the root or at a home folder by its last part alone.

    Where it lay is of no use to others, and may hold the user's name.
    """
    path = PurePath(name)
    return f"./{path.name}" if path.is_absolute() or name.startswith("~") else name
