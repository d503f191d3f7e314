"""A data set of the hub, read from the memory-mapped tables that the datasets library keeps."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsft.core.data.rows import BadRow, Row, read_batch
from dsft.core.errors import DataError, UnreachableHubError
from dsft.core.hub import is_hub_reachable

BATCH_ROWS = 512
COMMIT_LENGTH = 40


class HubSource:
    """The rows of one split of a hub data set.

    Args:
        name: Hub id.
        table: What the datasets library loaded.
        commit: Commit the rows are of; None where the library does not say.
    """

    kind = "hub"

    def __init__(self, name: str, table: Any, commit: str | None) -> None:
        self.name = name
        self.left_out: Mapping[str, int] = {}
        self.commit = commit
        self._table = table

    def content_key(self) -> str:
        """Return a hash of the commit and of the library's own fingerprint of the table."""
        facts = f"{self.name}\0{self.commit}\0{self._table.split}\0{len(self._table)}\0{self._table._fingerprint}"
        return hashlib.blake2b(facts.encode(), digest_size=32).hexdigest()

    def rows(self) -> Iterator[Row | BadRow]:
        """Read the rows in batches of the memory-mapped table."""
        number = 0
        for batch in self._table.with_format("arrow").iter(batch_size=BATCH_ROWS):
            for found in read_batch(batch):
                where = f"{self.name} row {number + 1}"
                yield BadRow(number, where, found) if isinstance(found, str) else Row(number, where, found)
                number += 1


def open_hub_source(name: str, splits: Sequence[str], revision: str | None) -> HubSource:
    """Load a hub data set, from the local cache where the hub does not answer.

    Only called for names of no local file or folder, which its messages say too.

    Args:
        name: Hub id.
        splits: The first of these that the data set has is read.
        revision: Hub branch, tag or commit.

    Raises:
        DataError: The hub has no such data set, revision or split.
        UnreachableHubError: The hub did not answer and the local cache does not hold the data set.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with _quiet_library():
            builder = datasets.load_dataset_builder(name, revision=revision)
            if revision is not None and isinstance(builder, Cache):
                # Without the hub the library takes whatever commit it has.
                builder = _find_cached(name, revision)
            builder.download_and_prepare()
            found = builder.as_dataset()
    except (
        datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError, GatedRepoError, HFValidationError
    ) as error:  # fmt: skip
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise _no_revision(name, revision) from error
        raise DataError(
            f"There is no local file or folder {name}, and the hub has no such data set, or it is private or needs "
            "approval.",
            "Check --dataset, or run hf auth login.",
        ) from error
    except RevisionNotFoundError as error:
        raise _no_revision(name, revision) from error
    except (ConnectionError, HfHubHTTPError, FileNotFoundError) as error:
        raise _unreachable(name) from error
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(
            f"The hub's data set {name} can't be loaded: {first_line}",
            "Download the file with the rows you want and give it with --dataset FILE.",
        ) from error
    split = next((split for split in splits if split in found), None)
    if split is None:
        raise DataError(f"The hub's {name} has no split {splits[0]}, but {', '.join(found)}.", "Set --dataset-split.")
    table = found[split]
    return HubSource(name, table, _commit_of(table))


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep the library from drawing, and where the hub does not answer from half a minute of retries."""
    import datasets

    was_offline, had_bars = datasets.config.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled() is False
    datasets.config.HF_HUB_OFFLINE = was_offline or not is_hub_reachable()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        if had_bars:
            datasets.enable_progress_bars()


def _find_cached(name: str, revision: str) -> Any:
    """Return the library's builder of a commit's tables in its cache.

    Raises:
        UnreachableHubError: They are not there, or the revision is not the full id of a commit.
        ValueError: They are there in several configurations.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    if len(revision) != COMMIT_LENGTH:
        raise UnreachableHubError(
            f"The hub can't be reached, so it can't be told which commit of {name} the revision {revision} is.",
            "Connect to the network, or set --dataset-revision to the full id of a commit.",
        )
    owner, _, short = name.rpartition("/")
    root = Path(datasets.config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(short)}")
    # The library keeps the tables of each configuration, version and commit in a folder of their own.
    folders = sorted(root.glob(f"*/*/{revision}"))
    if not folders:
        raise _unreachable(name, f" at revision {revision}")
    configurations = [folder.parts[-3] for folder in folders]
    if len(folders) > 1:
        raise ValueError(f"it has the configurations {', '.join(configurations)}")
    return Cache(
        dataset_name=short, repo_id=name, config_name=configurations[0], version=folders[0].parent.name, hash=revision
    )


def _commit_of(table: Any) -> str | None:
    for file in table.cache_files:
        folder = Path(file["filename"]).parent.name
        if len(folder) == COMMIT_LENGTH:
            return folder
    return None


def _no_revision(name: str, revision: str | None) -> DataError:
    return DataError(f"The hub's {name} has no revision {revision}.", "Check --dataset-revision.")


def _unreachable(name: str, revision: str = "") -> UnreachableHubError:
    return UnreachableHubError(
        f"The hub can't be reached and the data set {name}{revision} is not in its local cache; there is no local file "
        f"or folder {name} either.",
        "Connect to the network, give a local file with --dataset FILE, or try --preset tiny, which needs no hub.",
    )
