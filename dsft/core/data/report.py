"""What was found in a data set and what became of it, and one sample as its tokens; data only, views draw it."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsft.core.data.rows import BadRow
from dsft.core.data.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_PLACES = 5
"""Places that are kept of each kind of unusable row."""


@dataclass
class BadRows:
    """Rows that can't be used for one reason.

    Attributes:
        reason: What is wrong with them.
        count: How many.
        places: Where the first of them are.
    """

    reason: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        """Count a row."""
        self.count += 1
        if len(self.places) < MAX_PLACES:
            self.places.append(row.where)


@dataclass
class LengthSummary:
    """How long samples are, in tokens."""

    mean: float
    median: int
    p90: int
    p99: int
    longest: int

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64]) -> "LengthSummary":
        """Summarise the lengths of at least one sample, int64, shape [num_samples]."""
        median, p90, p99 = np.quantile(lengths, [0.5, 0.9, 0.99], method="closest_observation").tolist()
        return cls(round(float(lengths.mean()), 1), int(median), int(p90), int(p99), int(lengths.max()))


@dataclass
class DataReport:
    """What a data set holds and what is used of it; counts of rows unless a name says otherwise."""

    dataset: str
    layout: str
    columns: list[str]
    """The columns that are used."""
    template: str
    unused_columns: list[str] = field(default_factory=list)
    """Columns that rows have and nothing is made of."""
    num_rows: int = 0
    """Rows read."""
    num_used_rows: int = 0
    """Rows of which there is at least one sample."""
    bad_rows: list[BadRows] = field(default_factory=list)
    num_over_length: int = 0
    """Left out because longer than the longest sequence."""
    num_no_room: int = 0
    """Left out because the prompt alone fills the longest sequence."""
    num_truncated: int = 0
    """Cut, with their end token kept."""
    num_split: int = 0
    """Texts that became several samples."""
    num_left_out_windows: int = 0
    """Parts of source texts in which no gap was found that fits."""
    num_without_end: int = 0
    """Rows whose last sample does not end with an end token that is learned; counted on the stored tokens."""
    num_without_target: int = 0
    """Samples without a token that carries loss; counted on the stored tokens."""
    num_samples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    """Tokens that carry loss."""
    lengths: LengthSummary | None = None
    num_repeated_prompts: int = 0
    """Samples of rows whose prompt an earlier row has already."""
    files_left_out: dict[str, int] = field(default_factory=dict)
    """Files of a folder that are no data, by reason."""
    num_train_samples: int = 0
    num_validation_samples: int = 0
    num_shared_prompts: int = 0
    """Prompts of a validation data set that are also trained on."""
    validation: "DataReport | None" = None
    """The same about the validation data set, where there is one."""
    remarks: list[str] = field(default_factory=list)
    """Sentences the user should read."""
    is_from_cache: bool = False
    """Whether the tokens were read from the cache instead of made."""
    seconds: float = 0.0
    """How long reading or making them took."""
    rows_per_s: float = 0.0
    """Rows read and tokenized a second, when the tokens were made."""

    @property
    def num_bad_rows(self) -> int:
        """Rows that can't be used, for whatever reason."""
        return sum(bad.count for bad in self.bad_rows)

    def count_bad_row(self, row: BadRow) -> None:
        """Count a row that can't be used."""
        for known in self.bad_rows:
            if known.reason == row.reason:
                known.add(row)
                return
        self.bad_rows.append(BadRows(row.reason))
        self.bad_rows[-1].add(row)

    def as_dict(self) -> dict[str, object]:
        """Return the report as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        """Return the report that `as_dict` gave; of a single data set, without validation.

        Raises:
            TypeError: The values are not those of a report.
        """
        report = cls(**values)
        report.bad_rows = [BadRows(**bad) for bad in values["bad_rows"]]
        report.lengths = None if values["lengths"] is None else LengthSummary(**values["lengths"])
        return report


@dataclass(frozen=True)
class SamplePreview:
    """One sample in pieces of text; a piece is one token, or as many as it takes to make whole characters.

    Attributes:
        pieces: The text of each piece and whether it carries loss.
        num_tokens: Tokens of the sample.
        num_target_tokens: Tokens that carry loss.
        row: Source row, counted from 0.
    """

    pieces: list[tuple[str, bool]]
    num_tokens: int
    num_target_tokens: int
    row: int


def preview_sample(sample: Sample, tokenizer: "PreTrainedTokenizerFast") -> SamplePreview:
    """Return a sample as text with its loss mask."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    backend = tokenizer.backend_tokenizer
    pieces: list[tuple[str, bool]] = []
    pending: list[int] = []
    for token_id, is_target in zip(sample.token_ids.tolist(), sample.is_target.tolist(), strict=True):
        pending.append(token_id)
        # None until the tokens so far make whole characters.
        text = stream.step(backend, token_id)
        if text is not None:
            pieces.append((text, is_target))
            pending.clear()
    if pending:
        pieces.append((backend.decode(pending, skip_special_tokens=False), bool(sample.is_target[-1])))
    return SamplePreview(pieces, len(sample.token_ids), int(sample.is_target.sum()), sample.row)
