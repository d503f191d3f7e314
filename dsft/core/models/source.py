"""Where a model comes from: a local folder, a shipped builtin or the hub, and by what its weights are known again."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.core.errors import ModelError, UnreachableHubError
from dsft.core.hub import is_hub_reachable
from dsft.core.paths import presets_dir, resolve_builtin


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: What the user typed.
        location: Local folder, or hub id, as `from_pretrained` takes it.
        revision: Hub revision asked for; None for a local folder.
        commit: Hub commit the revision stands for now; None for a local folder.
        model_config: The content of config.json.
    """

    name: str
    location: str
    revision: str | None
    commit: str | None
    model_config: dict[str, Any]

    @property
    def is_local(self) -> bool:
        """Whether the model is a local folder."""
        return Path(self.location).is_dir()

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments for every `from_pretrained` call on this model."""
        if self.is_local:
            return {"local_files_only": True, "trust_remote_code": False}
        return {
            "revision": self.commit or self.revision,
            "local_files_only": not is_hub_reachable(),
            "trust_remote_code": False,
        }


_BUILTIN = "builtin:"

_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 4096


def fingerprint_weights(source: ModelSource) -> str:
    """Return what tells a model's weights from others: the hub's commit, or a hash over a local folder.

    The hash takes config.json, and of each safetensors file its name, its size and 64 blocks spread evenly, the first
    with the header: any training changes all weights, and reading 13 GB at every start would take longer than loading.
    """
    if not source.is_local:
        return source.commit or f"{source.name}@{source.revision or 'main'}"
    digest = hashlib.sha256(json.dumps(source.model_config, sort_keys=True).encode())
    for path in sorted(Path(source.location).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(_SAMPLED_BLOCKS):
                file.seek(max(0, size - _BLOCK_BYTES) * block // (_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a model and read its config.json.

    Args:
        name: `builtin:` name, local folder or hub id.
        revision: Hub branch, tag or commit; local folders have none.

    Raises:
        ModelError: There is no such model, its folder has no readable config.json, or it is local and a revision was
            asked for.
        UnreachableHubError: The hub did not answer and its cache does not hold the model.
    """
    builtin = resolve_builtin(name)
    if builtin is not None or _looks_like_path(name):
        folder = builtin if builtin is not None else Path(name).expanduser()
        _check_folder(folder, name)
        if revision is not None:
            raise ModelError(
                f"model_revision: {name} is a local folder, and only models of the hub have revisions.",
                "Leave --model-revision out.",
            )
        config = _read_config(folder / "config.json", name)
        return ModelSource(name, str(folder.resolve()), None, None, config)
    return _find_on_hub(name, revision)


def _check_folder(folder: Path, name: str) -> None:
    # What was found is said so that it does without the hint: commands with another option have hints of their own.
    if name.startswith(_BUILTIN) and not (folder / "config.json").is_file():
        root = presets_dir()
        models = sorted(f"{_BUILTIN}{path.parent.relative_to(root)}" for path in root.rglob("config.json"))
        raise ModelError(
            f"There is no model folder {name}; dsft brings along {', '.join(models)}.", "Take one of those."
        )
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        raise ModelError(
            f"{name} is a GGUF file, which llama.cpp and Ollama read, but dsft does not.",
            "Give the folder or hub id of the model that it was made from.",
        )
    if folder.is_file():
        raise ModelError(f"{name} is a file, and a model is a folder.", "Give the folder that the file is in.")
    if not folder.is_dir():
        raise ModelError(f"There is no model folder {name}.", "Check the path given as --model-name.")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "Give a folder that holds config.json, the weights as safetensors and the tokenizer."
        if (path.parent / "adapter_config.json").exists():
            hint = "This is an adapter: give the base model, or merge the adapter first."
        raise ModelError(f"The folder {name} has no config.json, so it is no model.", hint) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{path} can't be read: {error}.", "Copy the model again.") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ModelError(f"{path} names no model_type.", "Copy the model again.")
    return config


def _find_on_hub(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=not is_hub_reachable()))
    except LocalEntryNotFoundError as error:
        raise UnreachableHubError(
            f"The model hub can't be reached and {name} is not in its local cache.",
            "Connect to the network, give a local folder with --model-name DIR, or try --preset tiny, "
            "which needs no hub.",
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"The hub lets only approved accounts read {name}.", "Ask for access there, then run hf auth login."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"The hub has no model {name} (or it is private).", "Check --model-name, or run hf auth login."
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise ModelError(
            f"The hub's {name} has no config.json at revision {revision or 'main'}.", "Check --model-revision."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UnreachableHubError(
            f"The model hub answered the request for {name} with an error: {error}.",
            "Try again later, or give a local folder with --model-name DIR.",
        ) from error
    # The hub's cache keeps each commit in a folder named after it.
    commit = path.parent.name if path.parent.parent.name == "snapshots" else None
    return ModelSource(name, name, revision, commit, _read_config(path, name))
