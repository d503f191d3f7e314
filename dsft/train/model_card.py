"""The README.md of a trained adapter: what it is, how it was made, how it did, how it is used. Writes no file."""

import json
import re
import shlex
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dsft.core.units import format_count, format_duration, format_gib
from dsft.train.events import TrainResult

if TYPE_CHECKING:
    from dsft.core.data.prompts import PromptTemplate

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

_EXAMPLES = {"text": "def binary_search(items, target):", "fim": "def area(radius):"}
_EXAMPLE_INSTRUCTION = "Write a Python function times_four(n) that returns n times 4."


def example_question(template_name: str) -> str:
    """Return what the examples ask a model that was trained with a template."""
    return _EXAMPLES.get(template_name, _EXAMPLE_INSTRUCTION)


def write_example_prompt(template: "PromptTemplate") -> str:
    """Return a short prompt as the template writes it, control tokens spelled out."""
    return "".join(segment.text for segment in template.render_prompt(example_question(template.name)))


def render_model_card(result: TrainResult) -> str:
    """Return the card as Markdown with a YAML front matter, as the model hub reads it."""
    blocks = [
        _front_matter(result),
        f"# {result.run_name}",
        f"LoRA adapter of {_code(result.model['name'])}, trained on {_code(result.config['dataset'])} with "
        f"[QLoRA](https://arxiv.org/abs/2305.14314) by dsft {result.dsft_version}.",
        "## Use",
        _usage(result),
        "## Training",
        _table(_training_rows(result)),
        _table(list(result.techniques.items()), header=("Technique", "In this run")),
        "## Results",
        _table(_result_rows(result)),
        "![Training and validation loss](loss.png)",
        "Made with " + ", ".join(f"{name} {version}" for name, version in result.versions.items()) + ".",
        "`training_summary.json` holds the whole configuration and every loss.",
    ]
    return "\n\n".join(blocks) + "\n"


def is_hub_id(name: object) -> bool:
    """Return whether a name of a model or data set is an id of the hub, and not a path or a builtin name."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


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
    name, revision = _without_home(str(result.model["name"])), result.model.get("revision")
    base, extra_import = _literal(name), ""
    if name.startswith("builtin:"):
        # Where the shipped model is depends on the installation.
        base, extra_import = f"resolve_builtin({base})", "from dsft.core.paths import resolve_builtin\n"
    elif name.startswith("~"):
        base, extra_import = f"os.path.expanduser({base})", "import os\n\n"
    elif is_hub_id(name) and revision:
        base = f"{base}, revision={_literal(str(revision))}"
    return f"""{extra_import}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_model = AutoModelForCausalLM.from_pretrained(
    {base},
    dtype="auto",
    device_map="auto",
)
model = PeftModel.from_pretrained(base_model, {_literal(folder)})
tokenizer = AutoTokenizer.from_pretrained({_literal(folder)})

prompt = {_literal(result.example_prompt)}
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_new_tokens=512, do_sample=False)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _training_rows(result: TrainResult) -> list[tuple[str, str]]:
    config: dict[str, Any] = result.config
    model: dict[str, Any] = result.model
    data: dict[str, Any] = result.data
    micro, accumulation = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
    revision = model.get("revision")
    return [
        ("Base model", _code(model["name"]) + (f" at {_code(revision)}" if revision else "")),
        (
            "Data",
            f"{_code(config['dataset'])}, {format_count(data['num_train_samples'])} samples to train on and "
            f"{format_count(data['num_validation_samples'])} held out",
        ),
        ("Prompt template", f"{_code(result.template)}, loss on {config['loss_on']} tokens"),
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


def _table(rows: list[tuple[str, str]], header: tuple[str, str] = ("", "")) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(value: object) -> str:
    return f"`{_without_home(str(value)).replace('`', '')}`"


def _without_home(path: str) -> str:
    """Return a path with the user's home folder as `~`: cards are published."""
    home = str(Path.home())
    return f"~{path.removeprefix(home)}" if path == home or path.startswith(f"{home}/") else path


def _literal(text: str) -> str:
    """Return a text as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)
