"""Which model a verb takes: the folder the user names or the newest run, its base model and what the run recorded.

Reads names only: adapter_config.json and what the run wrote of itself, no weights.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from dsft.core.data.prompts import TemplateName
from dsft.core.errors import ConfigError, ModelError, UnreachableHubError
from dsft.core.json_file import read_json_object
from dsft.core.models.device import Precision
from dsft.core.models.source import ModelSource, find_model

SUMMARY_FILE = "training_summary.json"
RECORD_FILE = "run.json"
"""In a run's output folder, beside its checkpoints; has the same `template` and `model` as the summary."""

ADAPTER_FILE = "adapter_config.json"
MERGED_FOLDER = "merged_model"
MERGE_SUMMARY_FILE = "merge_summary.json"
"""In a merged model's folder, wherever it was written; has the `template` of the run."""


@dataclass(frozen=True)
class BaseName:
    """Name of a base model, and where that name was found."""

    name: str
    revision: str | None
    origin: str


@dataclass(frozen=True)
class ModelChoice:
    """What is to be loaded.

    Attributes:
        name: The model for people: as typed, or the folder that was found.
        adapter_dir: Folder of the LoRA adapter; None for a whole model.
        bases: Names of the model whose weights are loaded, the first one that is found counts.
        recorded_bases: The names that the run and the adapter recorded, whatever is loaded.
        template: Prompt template recorded by the training run; None where none is recorded.
        fingerprint: What the run knew the base model's weights by; None where it is not recorded.
        precision: Compute type of the run; None where it is not recorded.
    """

    name: str
    adapter_dir: Path | None
    bases: tuple[BaseName, ...]
    template: TemplateName | None
    recorded_bases: tuple[BaseName, ...] = ()
    fingerprint: str | None = None
    precision: Precision | None = None


def find_newest_run(parent: Path, option: str | None = None) -> Path:
    """Return the newest finished run among the folders `trained_*`: its summary was written last.

    Args:
        parent: Folder in which runs are looked for.
        option: Option by which the command takes another one, for hints; None where it is an argument.

    Raises:
        ModelError: There is none.
    """
    folders = sorted(folder for folder in parent.glob("trained_*") if _is_model_folder(folder))
    finished = [folder for folder in folders if (folder / SUMMARY_FILE).is_file()]
    if finished:
        return max(finished, key=lambda folder: (folder / SUMMARY_FILE).stat().st_mtime_ns)
    if folders:
        raise ModelError(
            f"{folders[0].name} has no {SUMMARY_FILE}, so it is no finished run, and there is no other.",
            f"To use it all the same, name it: {_give(option, f'./{folders[0].name}')}.",
        )
    raise ModelError(
        f"There is no finished run in a folder trained_* of {parent.resolve()}.",
        f"Train one with `dsft train`, or name the folder of another: {_give(option, 'FOLDER')}.",
    )


def choose_model(model: str | None, base: str | None, parent: Path, option: str | None = None) -> ModelChoice:
    """Find out what is to be loaded.

    Args:
        model: Adapter folder, model folder, hub id or `builtin:` name; None takes the newest run.
        base: Base model of an adapter, instead of the recorded one.
        parent: Folder in which runs are looked for.
        option: Option that `model` was given by, for hints; None where it is an argument.

    Raises:
        ModelError: No run, or a damaged adapter_config.json, training_summary.json or run.json.
        ConfigError: A name is empty, or a base model was named for something that is no adapter.
    """
    for name, flag in ((model, option or "The model's name"), (base, "--base")):
        if name is not None and not name.strip():  # as a path it would be the working folder
            raise ConfigError(f"{flag} is empty.", "Name a folder or hub id, or leave it out.")
    folder = find_newest_run(parent, option) if model is None else Path(model).expanduser()
    name = f"./{folder.name}" if model is None else model
    record = _find_record(folder)
    recorded = {} if record is None else read_json_object(record, "folder")
    template = _recorded_template(record, recorded)
    if not (folder / ADAPTER_FILE).is_file():
        if base is not None:
            raise ConfigError(
                f"--base was given, but {name} is no adapter folder (it has no {ADAPTER_FILE}).",
                f"Leave --base out, or name the adapter's folder: {_give(option, 'FOLDER')}.",
            )
        if (folder / RECORD_FILE).is_file():
            steps = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
            adapters = [f"checkpoint-{step}" for step in sorted(filter(str.isdigit, steps), key=int)]
            raise ModelError(
                f"{name} is a run's folder of checkpoints and no model itself.",
                f"Name one of them ({', '.join(adapters)}), e.g. {_give(option, name.rstrip('/'))}/{adapters[-1]}."
                if adapters
                else "It holds no checkpoint yet.",
            )
        path = str(folder) if model is None else model
        return ModelChoice(name, None, (BaseName(path, None, option or "the argument"),), template)
    recorded_bases = _recorded_bases(folder, record, recorded)
    bases = recorded_bases if base is None else (BaseName(base, None, "--base"),)
    if not bases:
        raise ModelError(f"The adapter {folder} does not say which base model it belongs to.", "Say it with --base.")
    return ModelChoice(
        name,
        folder,
        bases,
        template,
        recorded_bases,
        _recorded_model(recorded).get("fingerprint"),
        _recorded_precision(recorded),
    )


def find_base(choice: ModelChoice) -> tuple[ModelSource, BaseName]:
    """Find the model whose weights are to be loaded.

    Raises:
        ModelError: None of the names leads to a model.
        UnreachableHubError: The hub did not answer, and its cache does not hold the model.
    """
    failures: list[ModelError | UnreachableHubError] = []
    for base in choice.bases:
        try:
            return find_model(base.name, base.revision), base
        except (ModelError, UnreachableHubError) as error:
            failures.append(error)
    reasons = " ".join(error.found for error in failures)
    kind = type(failures[0])
    if choice.adapter_dir is None:
        raise kind(reasons, "Name an adapter folder, a model folder or a hub id that can be reached.")
    names = " or ".join(base.name for base in choice.bases)
    raise kind(
        f"The base model of the adapter {choice.name}, {names}, is not there: {reasons}",
        "Say where it is: --base FOLDER or hub id.",
    )


def find_tokenizer(choice: ModelChoice, base: ModelSource) -> ModelSource:
    """Return where the tokenizer is: with the adapter, which was trained on it, else with the base model."""
    folder = choice.adapter_dir
    if folder is None or not (folder / "tokenizer.json").is_file():
        return base
    return replace(base, name=str(folder), location=str(folder.resolve()), revision=None, commit=None)


def _is_model_folder(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file() or (folder / "config.json").is_file()


def _find_record(folder: Path) -> Path | None:
    """Return where it is told of the model in a folder how it was trained.

    A merged model's own record goes before that of the run it may lie in: another adapter can be merged there.
    """
    places = [folder / MERGE_SUMMARY_FILE, folder / SUMMARY_FILE]
    if folder.name == MERGED_FOLDER:
        places.append(folder.parent / SUMMARY_FILE)
    if (folder / ADAPTER_FILE).is_file():
        places.append(folder.resolve().parent / RECORD_FILE)
    return next((place for place in places if place.is_file()), None)


def _recorded_template(record: Path | None, recorded: dict[str, Any]) -> TemplateName | None:
    template = recorded.get("template")
    for name in get_args(TemplateName):
        if name == template:
            return cast(TemplateName, name)
    if template is None:
        return None
    raise ModelError(
        f"{record} names the prompt template {template}, which this version of dsft does not know.",
        "Install the version that trained it, or a newer one.",
    )


def _recorded_model(recorded: dict[str, Any]) -> dict[str, Any]:
    model = recorded.get("model")
    return model if isinstance(model, dict) else {}


def _recorded_precision(recorded: dict[str, Any]) -> Precision | None:
    precision = _recorded_model(recorded).get("precision")
    return next((name for name in get_args(Precision) if name == precision), None)


def _give(option: str | None, value: str) -> str:
    return value if option is None else f"{option} {value}"


def _recorded_bases(folder: Path, record: Path | None, recorded: dict[str, Any]) -> tuple[BaseName, ...]:
    # The run's own record holds the name as it was typed, which outlives a new installation (builtin: names) but not a
    # change of the working folder; the adapter's own record is the other way round.
    adapter = read_json_object(folder / ADAPTER_FILE, "folder")
    kind = adapter.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder} holds a {kind} adapter, and dsft reads LoRA adapters.", "Merge it with PEFT first.")
    records = (
        (_recorded_model(recorded), "name", record.name if record is not None else ""),
        (adapter, "base_model_name_or_path", ADAPTER_FILE),
    )
    bases: dict[str, BaseName] = {}
    for names, key, origin in records:
        if names.get(key):
            bases.setdefault(names[key], BaseName(names[key], names.get("revision"), origin))
    return tuple(bases.values())
