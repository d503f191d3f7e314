"""The README.md of a trained adapter: what it is, how it was made, how it did, how it is used. Writes no file."""

import shlex
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from dsft.core.data.example_question import example_question
from dsft.core.markdown import format_code, format_generation, format_literal, format_table, is_hub_id, without_home
from dsft.core.units import format_count, format_duration, format_gib
from dsft.train.events import TrainResult

if TYPE_CHECKING:
    from dsft.core.data.prompts import PromptTemplate


def write_example_prompt(template: "PromptTemplate") -> str:
    """Return a short prompt as the template writes it, control tokens spelled out."""
    return "".join(segment.text for segment in template.render_prompt(example_question(template.name)))


def render_model_card(result: TrainResult) -> str:
    """Return the card as Markdown with a YAML front matter, as the model hub reads it."""
    blocks = [
        _front_matter(result),
        f"# {result.run_name}",
        f"LoRA adapter of {format_code(result.model['name'])}, trained on {format_code(result.config['dataset'])} with "
        f"[QLoRA](https://arxiv.org/abs/2305.14314) by dsft {result.dsft_version}.",
        "## Use",
        _usage(result),
        "## Training",
        format_table(_training_rows(result)),
        format_table(list(result.techniques.items()), header=("Technique", "In this run")),
        "## Results",
        format_table(_result_rows(result)),
        "![Training and validation loss](loss.png)",
        "Made with " + ", ".join(f"{name} {version}" for name, version in result.versions.items()) + ".",
        "`training_summary.json` holds the whole configuration and every loss.",
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(result: TrainResult) -> str:
    import yaml

    tags = ["lora", "qlora", "dsft"]
    fields: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if is_hub_id(result.model["name"]):
        fields["base_model"] = result.model["name"]
        tags.insert(0, f"base_model:adapter:{result.model['name']}")
    if is_hub_id(result.config["dataset"]):
        fields["datasets"] = [result.config["dataset"]]
    fields["tags"] = tags
    return f"---\n{yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)}---"


def _usage(result: TrainResult) -> str:
    # An absolute path is of no use to others, and may hold the user's name.
    typed = PurePath(result.save_dir)
    folder = f"./{typed.name}" if typed.is_absolute() else result.save_dir
    return f"""With dsft, which knows the prompt template (`{result.template}`) from this folder:

```sh
dsft infer {shlex.quote(example_question(result.template))} --model {shlex.quote(folder)}
```

With PEFT alone:

```python
{_snippet(result, folder)}
```"""


def _snippet(result: TrainResult, folder: str) -> str:
    name, revision = without_home(str(result.model["name"])), result.model.get("revision")
    base, extra_import = format_literal(name), ""
    if name.startswith("builtin:"):
        # Where the shipped model is depends on the installation.
        base, extra_import = f"resolve_builtin({base})", "from dsft.core.paths import resolve_builtin\n"
    elif name.startswith("~"):
        base, extra_import = f"os.path.expanduser({base})", "import os\n\n"
    elif is_hub_id(name) and revision:
        base = f"{base}, revision={format_literal(str(revision))}"
    return f"""{extra_import}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_model = AutoModelForCausalLM.from_pretrained(
    {base},
    dtype="auto",
    device_map="auto",
)
model = PeftModel.from_pretrained(base_model, {format_literal(folder)})
tokenizer = AutoTokenizer.from_pretrained({format_literal(folder)})

{format_generation(result.example_prompt)}"""


def _training_rows(result: TrainResult) -> list[tuple[str, str]]:
    config: dict[str, Any] = result.config
    model: dict[str, Any] = result.model
    data: dict[str, Any] = result.data
    micro, accumulation = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
    revision = model.get("revision")
    return [
        ("Base model", format_code(model["name"]) + (f" at {format_code(revision)}" if revision else "")),
        (
            "Data",
            f"{format_code(config['dataset'])}, {format_count(data['num_train_samples'])} samples to train on and "
            f"{format_count(data['num_validation_samples'])} held out",
        ),
        ("Prompt template", f"{format_code(result.template)}, loss on {config['loss_on']} tokens"),
        ("LoRA", f"rank {config['lora_r']}, alpha {config['lora_alpha']:g}, dropout {config['lora_dropout']:g}"),
        (
            "Trained weights",
            f"{format_count(model['num_trainable_parameters'])} of {format_count(model['num_parameters'])}",
        ),
        ("Effective batch", f"{micro * accumulation} ({micro} x {accumulation})"),
        ("Longest sequence", f"{format_count(config['max_length'])} tokens"),
        (
            "Learning rate",
            f"{config['learning_rate']:g}, {config['lr_scheduler']}, {config['warmup_ratio'] * 100:g} % warm-up",
        ),
        ("Steps", f"{format_count(result.num_steps)} ({result.num_epochs:.3g} epochs), seed {config['seed']}"),
    ]


def _result_rows(result: TrainResult) -> list[tuple[str, str]]:
    rows = [("Training loss", f"{result.first_loss:.4f} at first, {result.final_loss:.4f} at last")]
    if result.validation_losses:
        (first_step, first), (last_step, last) = result.validation_losses[0], result.validation_losses[-1]
        rows.append(("Validation loss", f"{first:.4f} at step {first_step}, {last:.4f} at step {last_step}"))
    if result.best_validation_loss is not None:
        rows.append(("Best validation loss", f"{result.best_validation_loss:.4f} at step {result.best_step}"))
    rows += [
        ("Adapter kept", f"of the {result.kept} step" if result.kept == "last" else f"of step {result.best_step}"),
        ("Time", _time(result)),
    ]
    if result.train_tok_per_s > 0:
        rows.append(("Speed", f"{format_count(result.train_tok_per_s)} tokens/s, padding not counted"))
    if result.peak_memory_reserved_bytes is not None:
        rows.append(("Peak GPU memory", format_gib(result.peak_memory_reserved_bytes)))
    return rows


def _time(result: TrainResult) -> str:
    device = f" on {result.device}" if result.device else ""
    # The time of an earlier process, which ended in a checkpoint, is not known to this one.
    part = f" for the steps after {result.first_step}" if result.first_step else ""
    return format_duration(result.duration_s) + device + part
