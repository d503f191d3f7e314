"""The whole way of a run's data: from its name to tokenized samples to train and validate on, and the report."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsft.core.config.schema import TrainConfig
from dsft.core.data.build import SampleBuilder
from dsft.core.data.cache import FORMAT_VERSION, TokenStore, open_or_build
from dsft.core.data.formats import Layout, find_layout
from dsft.core.data.prompts import PromptTemplate, choose_template_name, get_template
from dsft.core.data.report import DataReport, SamplePreview, preview_sample
from dsft.core.data.rows import BadRow, Row
from dsft.core.data.samples import TokenizedDataset
from dsft.core.data.sources import Source, open_source
from dsft.core.data.split import SubsetDataset, split_by_prompt
from dsft.core.data.tokenize import LengthRule, SampleMaker
from dsft.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and validates on.

    Attributes:
        train: Samples to train on.
        validation: Samples held out; None where there are none.
        report: What was found and what became of it.
        template: How the samples are written, for inference too.
        preview: The first training sample with its loss mask.
        key: Hash of everything these samples and their division depend on.
    """

    train: TokenizedDataset
    validation: TokenizedDataset | None
    report: DataReport
    template: PromptTemplate
    preview: SamplePreview
    key: str


def prepare_data(
    config: TrainConfig,
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    tokenizer_fingerprint: str,
    cache: Path,
    on_rows: Callable[[int], None],
) -> PreparedData:
    """Read, tokenize and divide the data of a run; what was tokenized before is read from the cache.

    Args:
        config: The run's settings.
        source: The data set they name.
        tokenizer: The model's tokenizer, checked.
        tokenizer_fingerprint: Hash of everything that decides its ids.
        cache: dsft's cache folder.
        on_rows: Called now and then with the number of rows tokenized so far; never where the cache has them.

    Raises:
        DataError: The data can't be read, recognised or used; nothing was written.
        UnreachableHubError: A hub data set is not at hand.
        TokenizerError: The tokenizer makes control tokens of ordinary text.
    """
    preparation = _Preparation(config, tokenizer, tokenizer_fingerprint, cache, on_rows)
    prepared = preparation.prepare(source, template=None, max_samples=config.max_samples)
    store, report = prepared.store, prepared.report
    train: TokenizedDataset = store
    validation: TokenizedDataset | None = None
    if config.validation_dataset is not None:
        splits = ["validation", "test", config.dataset_split]
        held_out_source = open_source(config.validation_dataset, split=splits, revision=None)
        held_out = preparation.prepare(held_out_source, template=prepared.template, max_samples=None)
        validation = held_out.store
        report.validation = held_out.report
        report.num_shared_prompts = len(np.intersect1d(store.prompts, held_out.store.prompts))
        if report.num_shared_prompts:
            prompts = "1 prompt" if report.num_shared_prompts == 1 else f"{report.num_shared_prompts} prompts"
            are = "is" if report.num_shared_prompts == 1 else "are"
            report.remarks.append(f"{prompts} of the validation data {are} also trained on.")
        division = held_out.key
    else:
        division = f"{config.validation_split} {config.seed}" if config.validation_split else ""
        train_indices, held_out_indices = split_by_prompt(store.prompts, config.validation_split, config.seed)
        if len(held_out_indices):
            train, validation = SubsetDataset(store, train_indices), SubsetDataset(store, held_out_indices)
        elif config.validation_split:
            _refuse_or_remark(config, report, num_prompts=len(np.unique(store.prompts)))
    report.num_train_samples = len(train)
    report.num_validation_samples = len(validation) if validation is not None else 0
    return PreparedData(
        train=train,
        validation=validation,
        report=report,
        template=prepared.template,
        preview=preview_sample(train[0], tokenizer),
        key=_hash_facts({"samples": prepared.key, "division": division}),
    )


def _refuse_or_remark(config: TrainConfig, report: DataReport, *, num_prompts: int) -> None:
    reason = (
        "all are of the same prompt or text"
        if num_prompts == 1
        else "those of the same prompt or text stay together, and each such group is larger than "
        f"--validation-split {config.validation_split:g}"
    )
    found = f"No samples are held out for validation: {reason}."
    if config.keep == "best":
        raise DataError(found, "Set --validation-dataset, or --keep last.")
    report.remarks.append(found)


@dataclass(frozen=True)
class _Prepared:
    store: TokenStore
    report: DataReport
    template: PromptTemplate
    key: str


@dataclass(frozen=True)
class _Preparation:
    """What the training and the validation data have in common."""

    config: TrainConfig
    tokenizer: "PreTrainedTokenizerFast"
    tokenizer_fingerprint: str
    cache: Path
    on_rows: Callable[[int], None]

    def prepare(self, source: Source, *, template: PromptTemplate | None, max_samples: int | None) -> _Prepared:
        """Tokenize a data set, or find it in the cache."""
        started_s = time.perf_counter()
        layout = find_layout(_first_row(source), source.kind)
        if template is None:
            name = self.config.template
            template = get_template(
                choose_template_name(layout.name, self.tokenizer) if name == "auto" else name, self.tokenizer
            )
        rule = LengthRule(self.config.max_length, self.config.over_length, self.config.loss_on, self.config.seed)
        builder = SampleBuilder(
            source, layout, SampleMaker(template, rule), rule, max_samples, self.config.bad_rows, self.on_rows
        )
        key = self._key(source, layout, template, rule, max_samples)
        store, is_from_cache = open_or_build(self.cache, key, template.encoder.vocabulary_size, builder.build)
        report = DataReport.from_dict(store.report)
        report.dataset, report.is_from_cache = source.name, is_from_cache
        # Files that are no data do not count for the key.
        report.files_left_out = dict(source.left_out)
        report.seconds = round(time.perf_counter() - started_s, 3)
        return _Prepared(store, report, template, key)

    def _key(
        self, source: Source, layout: Layout, template: PromptTemplate, rule: LengthRule, max_samples: int | None
    ) -> str:
        import tokenizers

        draws_gaps = template.name == "fim" and layout.name in {"text", "source files"}
        return _hash_facts(
            {
                "format": FORMAT_VERSION,
                "tokenizers": tokenizers.__version__,
                "tokenizer": self.tokenizer_fingerprint,
                "content": source.content_key(),
                "layout": [layout.name, *layout.columns],
                "template": template.key,
                "max_length": rule.max_length,
                "over_length": rule.over_length,
                "loss_on": rule.loss_on,
                "seed": rule.seed if draws_gaps else None,
                "max_samples": max_samples,
                "bad_rows": self.config.bad_rows,
            }
        )


def _first_row(source: Source) -> Row:
    bad: BadRow | None = None
    for row in source.rows():
        if isinstance(row, Row):
            return row
        bad = bad or row
    if bad is not None:
        raise DataError(f"No row of {source.name} can be used: {bad.where} {bad.reason}.", "Rows must have columns.")
    raise DataError(f"{source.name} holds no rows.", "Give a data set with at least one row.")


def _hash_facts(facts: dict[str, object]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
