"""From examples to samples that fit: token ids, loss masks by position, and what became of what was too long."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dsft.core.data.examples import Example, RawText, UnusableRowError, hash_text, prompt_of
from dsft.core.data.gaps import GapDrawer
from dsft.core.data.prompts import FimTemplate, PromptTemplate
from dsft.core.data.rows import BadRow
from dsft.core.data.segments import EncodedSample, Segment

Outcome = Literal["over_length", "no_room", "truncated", "split", "window_left_out"]
"""What can become of a row: left out as too long; left out because not one token of the response fits; cut; made into
several samples. A window of a source text is left out where no gap with text in it fits."""

CHARACTER_TOKENS = 4
"""Most tokens that one character is spread over: its bytes in UTF-8."""


@dataclass(frozen=True)
class LengthRule:
    """What a sample may be.

    Attributes:
        max_length: Most tokens of a sample.
        over_length: Whether a longer one is left out or cut; texts without a prompt are made into several in any case.
        loss_on: Whether only the response carries loss, or everything behind the beginning-of-text token.
        seed: Seed of the gaps drawn into source texts.
    """

    max_length: int
    over_length: Literal["drop", "truncate"]
    loss_on: Literal["response", "all"]
    seed: int


class PlacedExample(NamedTuple):
    """An example and where it came from."""

    number: int
    where: str
    example: Example


@dataclass
class Fate:
    """What became of the rows that are not simply one sample each.

    Attributes:
        outcomes: Rows (windows) by what became of them.
        left_out_lengths: Tokens of each row that was left out as too long.
        bad_rows: Rows the template refused.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    left_out_lengths: list[int] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class SampleBatch:
    """Samples one after the other.

    Attributes:
        token_ids: uint32, shape [num_tokens].
        is_target: Whether each token carries loss, bool, shape [num_tokens].
        lengths: Tokens of each sample, int64, shape [num_samples].
        rows: Source row of each sample, int64, shape [num_samples].
        prompts: Hash of each sample's prompt, uint64, shape [num_samples].
        fate: What became of the other rows.
    """

    token_ids: npt.NDArray[np.uint32]
    is_target: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.uint64]
    fate: Fate


class SampleMaker:
    """Makes samples of examples.

    Args:
        template: How an example is written.
        rule: What a sample may be.
    """

    def __init__(self, template: PromptTemplate, rule: LengthRule) -> None:
        self._template = template
        self._rule = rule
        self._stop_ids = np.array(template.stop_token_ids, dtype=np.uint32)
        self._bos = np.array(template.bos, dtype=np.uint32)
        self._gaps = GapDrawer(template, rule.max_length, rule.seed) if isinstance(template, FimTemplate) else None

    def make(self, placed: Sequence[PlacedExample]) -> SampleBatch:
        """Make samples of a batch of examples.

        Raises:
            DataError: The template can't write examples of this kind.
            TokenizerError: The tokenizer makes control tokens of ordinary text.
        """
        fate = Fate()
        if self._gaps is not None and any(isinstance(item.example, RawText) for item in placed):
            samples = [self._draw(item.example, fate) for item in placed]
            return self._collect(placed, samples, fate)
        used: list[PlacedExample] = []
        rendered: list[list[Segment]] = []
        for item in placed:
            try:
                rendered.append(self._template.render(item.example))
                used.append(item)
            except UnusableRowError as error:
                fate.bad_rows.append(BadRow(item.number, item.where, error.reason))
        encoded = self._template.encoder.encode_samples(rendered)
        lengths = np.diff(encoded.bounds)
        if not (lengths > self._rule.max_length).any():
            return self._finish(used, np.ones_like(lengths), encoded.token_ids, encoded.is_target, lengths, fate)
        samples = [
            [sample] if len(sample.token_ids) <= self._rule.max_length else self._fit(sample, item.example, fate)
            for sample, item in zip(encoded.split(), used, strict=True)
        ]
        return self._collect(used, samples, fate)

    @property
    def template_name(self) -> str:
        """Name of the template."""
        return self._template.name

    def ends_with_learned_stop(self, batch: SampleBatch) -> npt.NDArray[np.bool_]:
        """Return whether each sample ends with an end token that carries loss, bool, shape [num_samples]."""
        last = np.cumsum(batch.lengths) - 1
        is_stop: npt.NDArray[np.bool_] = np.isin(batch.token_ids[last], self._stop_ids)
        return is_stop & batch.is_target[last]

    def _draw(self, example: Example, fate: Fate) -> list[EncodedSample]:
        if self._gaps is None or not isinstance(example, RawText):
            raise TypeError("gaps are drawn into texts only")
        samples, windows = self._gaps.draw_samples(example.text)
        fate.outcomes["window_left_out"] += windows["left out"]
        fate.outcomes["split"] += len(samples) > 1
        return samples

    def _fit(self, sample: EncodedSample, example: Example, fate: Fate) -> list[EncodedSample]:
        """Return what can be kept of a sample that is too long."""
        if isinstance(example, RawText):
            fate.outcomes["split"] += 1
            return list(self._split(sample))
        cut = self._truncate(sample) if self._rule.over_length == "truncate" else None
        if cut is not None:
            fate.outcomes["truncated"] += 1
            return [cut]
        fate.outcomes["over_length" if self._rule.over_length == "drop" else "no_room"] += 1
        fate.left_out_lengths.append(len(sample.token_ids))
        return []

    def _truncate(self, sample: EncodedSample) -> EncodedSample | None:
        """Cut the end of a sample and keep an end token as its last; None where no token of a response would be left.

        A cut inside a prompt goes back to the end of the answer before it, which has its own end token.
        """
        room = self._rule.max_length - 1
        is_answer = sample.is_target & ~np.isin(sample.token_ids, self._stop_ids)
        if is_answer[room - 1] and is_answer[room]:
            room = self._whole_characters(sample, room)
        if not is_answer[:room].any():
            return None
        if is_answer[room - 1]:
            token_ids = np.append(sample.token_ids[:room], sample.token_ids[-1])
            return EncodedSample(token_ids, np.append(sample.is_target[:room], True))
        end = int(np.flatnonzero(sample.is_target[:room])[-1]) + 1
        return EncodedSample(sample.token_ids[:end], sample.is_target[:end])

    def _whole_characters(self, sample: EncodedSample, end: int) -> int:
        """Return where to cut at or a little before `end` so that no character is cut in two."""
        decode = self._template.encoder.decode
        for cut in range(end, max(0, end - CHARACTER_TOKENS), -1):
            context = sample.token_ids[max(0, cut - CHARACTER_TOKENS) : cut].tolist()
            if not decode(context).endswith("\ufffd"):
                return cut
        return end

    def _split(self, sample: EncodedSample) -> Iterator[EncodedSample]:
        """Cut a text into windows of about the same length; each of its tokens is a target in one of them.

        Before the first target of a window stands the beginning-of-text token as in every prompt, or where the
        tokenizer has none, the last token of the window before.
        """
        num_bos = len(self._bos)
        stream = sample.token_ids[num_bos:]
        room = self._rule.max_length - max(1, num_bos)
        num_windows = -(-len(stream) // room)
        bounds = [len(stream) * index // num_windows for index in range(num_windows + 1)]
        for start, end in pairwise(bounds):
            context = self._bos if num_bos else stream[max(0, start - 1) : start]
            token_ids = np.concatenate([context, stream[start:end]])
            yield EncodedSample(token_ids, np.arange(len(token_ids)) >= len(context))

    def _collect(
        self, used: Sequence[PlacedExample], samples: Sequence[Sequence[EncodedSample]], fate: Fate
    ) -> SampleBatch:
        flat = [sample for of_row in samples for sample in of_row]
        counts = np.array([len(of_row) for of_row in samples], dtype=np.int64)
        lengths = np.array([len(sample.token_ids) for sample in flat], dtype=np.int64)
        token_ids = np.concatenate([np.empty(0, np.uint32), *(sample.token_ids for sample in flat)])
        is_target = np.concatenate([np.empty(0, np.bool_), *(sample.is_target for sample in flat)])
        return self._finish(used, counts, token_ids, is_target, lengths, fate)

    def _finish(
        self,
        used: Sequence[PlacedExample],
        counts: npt.NDArray[np.int64],
        token_ids: npt.NDArray[np.uint32],
        is_target: npt.NDArray[np.bool_],
        lengths: npt.NDArray[np.int64],
        fate: Fate,
    ) -> SampleBatch:
        """Return the batch of samples that lie one after the other, `counts` of them from each row."""
        numbers = np.array([item.number for item in used], dtype=np.int64)
        prompts = np.array([hash_text(prompt_of(item.example)) for item in used], dtype=np.uint64)
        if self._rule.loss_on == "all":
            is_target = np.ones(len(token_ids), dtype=np.bool_)
        # BOS is given, never learned, and nothing stands before a first token that could predict it.
        starts = np.cumsum(lengths) - lengths
        for offset in range(max(1, len(self._bos))):
            is_target[starts + offset] = False
        return SampleBatch(token_ids, is_target, lengths, np.repeat(numbers, counts), np.repeat(prompts, counts), fate)
