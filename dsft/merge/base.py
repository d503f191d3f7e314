"""The base model of a merge: where it is, whether it is the one the adapter was trained on, and its files.

A model of the hub is downloaded last, and of it only what is read: its weights take minutes to hours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dsft.core.errors import ModelError, UnreachableHubError
from dsft.core.hub import is_hub_reachable
from dsft.core.json_file import read_json_object
from dsft.core.models.find_run import BaseName, ModelChoice, find_base, find_tokenizer
from dsft.core.models.source import ModelSource, fingerprint_weights
from dsft.core.models.tokenizer import LoadedTokenizer, load_tokenizer
from dsft.core.models.weight_files import list_weight_files
from dsft.merge.config import MergeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORCE = "If you know that it is the same model, add --force."
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class FoundBase:
    """The base model that was found; of a hub's, only config.json is here.

    Attributes:
        source: The model.
        name: As named.
        fingerprint: What its weights are known by.
    """

    source: ModelSource
    name: BaseName
    fingerprint: str


@dataclass(frozen=True)
class Base(FoundBase):
    """A base model whose small files are here.

    Attributes:
        folder: Its files on this machine.
    """

    folder: Path

    def read_json(self, file: str) -> dict[str, Any] | None:
        """Return the content of one of its JSON files; None where it has no such file.

        Raises:
            ModelError: The file is damaged.
        """
        path = self.folder / file
        if not path.is_file():
            return None
        return read_json_object(path, "model")


def find_matching_base(config: MergeConfig, choice: ModelChoice) -> FoundBase:
    """Find the base model of an adapter and refuse another one.

    The weights' fingerprint decides where the run recorded one of the same kind; else the name does, of which the last
    part counts: a hub model and its copy in a folder are the same.

    Raises:
        ModelError: There is no such model, it is quantized, or it is not the adapter's.
        UnreachableHubError: The hub did not answer, and its cache does not hold the model.
    """
    source, name = find_base(choice)
    if "quantization_config" in source.model_config:
        raise ModelError(
            f"{source.name} is quantized, and a merge into quantized weights would damage the model.",
            "Give the 16-bit original with --base.",
        )
    fingerprint = fingerprint_weights(source)
    if not config.force:
        _check_is_the_same(config, choice, source, fingerprint)
    return FoundBase(source, name, fingerprint)


def fetch_small_files(found: FoundBase) -> Base:
    """Fetch the settings and the tokenizer of a base model.

    Raises:
        UnreachableHubError: The hub did not give them.
    """
    return Base(found.source, found.name, found.fingerprint, _fetch(found.source, _SMALL_FILES))


def fetch_weights(base: Base) -> None:
    """Fetch the files of weights that the base model's index names, or its only one, and no copy in other formats.

    Raises:
        ModelError: The index is damaged.
        UnreachableHubError: The hub did not give them.
    """
    _fetch(base.source, list_weight_files(base.folder))


def load_matching_tokenizer(choice: ModelChoice, base: Base) -> LoadedTokenizer:
    """Load the adapter's tokenizer, or the base's where it has none, and refuse one that gives tokens other ids.

    Raises:
        TokenizerError: It changes text.
        ModelError: The base's tokenizer has other tokens at the same ids.
    """
    source = find_tokenizer(choice, base.source)
    loaded = load_tokenizer(source)
    if source is base.source or not (base.folder / "tokenizer.json").is_file():
        return loaded
    change = _find_changed_token(load_tokenizer(base.source).tokenizer, loaded.tokenizer)
    if change is not None:
        raise ModelError(
            f"The adapter's tokenizer is not that of {base.name.name}: {change}.",
            "Give the model it was trained on with --base.",
        )
    return loaded


def _check_is_the_same(config: MergeConfig, choice: ModelChoice, source: ModelSource, fingerprint: str) -> None:
    recorded = choice.fingerprint
    if recorded is not None and len(recorded) == len(fingerprint):
        if recorded != fingerprint:
            raise ModelError(
                f"The weights of {source.name} are not those that {choice.name} was trained on.",
                f"Give the model it was trained on with --base. {_FORCE}",
            )
        return
    if config.base is None:
        return
    names = [base.name for base in choice.recorded_bases]
    if names and _last_part(config.base) not in {_last_part(name) for name in names}:
        raise ModelError(
            f"{choice.name} was trained on {' or '.join(names)}, and --base is {config.base}.",
            f"Leave --base out, or give a copy of that model. {_FORCE}",
        )


def _last_part(name: str) -> str:
    return PurePosixPath(name.removeprefix("builtin:").rstrip("/")).name.lower()


def _fetch(source: ModelSource, patterns: Sequence[str]) -> Path:
    if source.is_local:
        return Path(source.location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source.location,
                revision=source.commit or source.revision,
                allow_patterns=list(patterns),
                local_files_only=not is_hub_reachable(),
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UnreachableHubError(
            f"The model hub did not give all files of {source.name}: {first_line}",
            "Try again later, or give a local folder with --base DIR.",
        ) from error


def _find_changed_token(base: "PreTrainedTokenizerFast", own: "PreTrainedTokenizerFast") -> str | None:
    ids = own.get_vocab()
    for token, token_id in base.get_vocab().items():
        if ids.get(token) != token_id:
            return f"{token!r} has the id {token_id} there and {ids.get(token, 'none')} here"
    return None
