"""Text with its loss flag, and the one way it becomes token ids; templates and batches both go through here.

A segment is tokenized alone and joined to its neighbours by ids, because at inference the prompt is tokenized alone.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsft.core.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CONTROL_SPELLING = re.compile(r"<[|｜].+?[|｜]>", re.DOTALL)
"""Tokens between bars steer a model even where the tokenizer does not mark them special, as DeepSeek-Coder's
`<|EOT|>` and its fill-in-the-middle tokens."""

UNMARKED_CONTROL_TOKENS = frozenset({"<pad>", "<s>", "</s>", "<unk>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"})
"""Control tokens in angle brackets that some tokenizers do not mark special."""

PIECE_CHARACTERS = 1 << 18
"""Longer texts are tokenized in pieces: the tokenizer needs about a hundred bytes for each character."""

_CUTS = (re.compile(r"(?<=[^\W_])(?=\r?\n)"), re.compile(r"(?<=\S)(?=\r?\n)"))
"""Between a letter or digit and a line end no known pre-tokenizer has a token; some have one of punctuation and line
end."""


class Segment(NamedTuple):
    """A stretch of a sample.

    Attributes:
        text: The text as it is.
        is_target: Whether its tokens carry loss.
        parse_special: Whether the spelling of a control token stands for the token; user text never has this.
    """

    text: str
    is_target: bool
    parse_special: bool


@dataclass(frozen=True)
class EncodedSegments:
    """The token ids of many segments, one after the other.

    Attributes:
        token_ids: uint32, shape [num_tokens].
        lengths: Tokens of each segment, int64, shape [num_segments].
    """

    token_ids: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]


class EncodedSample(NamedTuple):
    """The token ids of one sample.

    Attributes:
        token_ids: uint32, shape [length].
        is_target: Which tokens are of target segments, bool, shape [length].
    """

    token_ids: npt.NDArray[np.uint32]
    is_target: npt.NDArray[np.bool_]


class EncodedSamples(NamedTuple):
    """The token ids of many samples, one after the other.

    Attributes:
        token_ids: uint32, shape [num_tokens].
        is_target: Which tokens are of target segments, bool, shape [num_tokens].
        bounds: Where each sample begins and the last one ends, int64, shape [num_samples + 1].
    """

    token_ids: npt.NDArray[np.uint32]
    is_target: npt.NDArray[np.bool_]
    bounds: npt.NDArray[np.int64]

    def split(self) -> list[EncodedSample]:
        """Return each sample by itself."""
        bounds = self.bounds.tolist()
        return [EncodedSample(self.token_ids[start:end], self.is_target[start:end]) for start, end in pairwise(bounds)]


class SegmentEncoder:
    """Turns segments into token ids with copies of a tokenizer, whose truncation and padding settings do not matter.

    Args:
        tokenizer: A fast tokenizer of transformers.

    Attributes:
        control_tokens: Spelling of each control token and its id.
        bos_segments: What the tokenizer itself puts before a text.
        end_token: Spelling of the end token.
        vocabulary_size: One more than the largest id.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._settings: dict[str, Any] = json.loads(backend.to_str())
        self._settings.update(truncation=None, padding=None, post_processor=None)
        added = backend.get_added_tokens_decoder()
        self.vocabulary_size = max(backend.get_vocab_size(), *added, 0) + 1
        self.control_tokens = {
            token.content: token_id for token_id, token in added.items() if _is_control(token.content, token.special)
        }
        self.end_token: str = tokenizer.eos_token
        self.bos_segments = [Segment(token, False, True) for token in _find_bos(tokenizer)]
        for token in (self.end_token, *(segment.text for segment in self.bos_segments)):
            self.control_tokens[token] = tokenizer.convert_tokens_to_ids(token)
        steering = [token_id for token, token_id in self.control_tokens.items() if token != tokenizer.unk_token]
        self._control_ids = {token: [token_id] for token, token_id in self.control_tokens.items()}
        self._marks_beginnings = _without_prefixes(self._settings) != self._settings
        self._is_control_id = np.zeros(self.vocabulary_size, dtype=np.bool_)
        self._is_control_id[np.array(steering, dtype=np.int64)] = True

    def token_id(self, control_token: str) -> int:
        """Return the id of a control token."""
        return self.control_tokens[control_token]

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """What matches the spelling of any control token, longest first."""
        spellings = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    def encode(self, samples: Iterable[Iterable[Segment]]) -> EncodedSegments:
        """Encode all segments of a batch of samples at once.

        Args:
            samples: The segments of each sample. The first that is no control token is the beginning of the text,
                where some tokenizers put a blank; the others continue it.

        Returns:
            The ids of all segments of all samples in order.

        Raises:
            TokenizerError: The tokenizer makes control tokens of ordinary text.
        """
        parts: list[list[int]] = []
        segment_of_part: list[int] = []
        # Texts and their positions among the parts, by the tokenizer that is to encode them.
        queues: dict[tuple[bool, bool], tuple[list[int], list[str]]] = defaultdict(lambda: ([], []))
        num_segments = 0
        for sample in samples:
            is_beginning = self._marks_beginnings
            for text, _, parse_special in sample:
                known_ids = self._control_ids.get(text) if parse_special else None
                if known_ids is not None:
                    parts.append(known_ids)
                    segment_of_part.append(num_segments)
                else:
                    for piece in (text,) if len(text) <= PIECE_CHARACTERS else _cut(text):
                        positions, texts = queues[parse_special, is_beginning]
                        positions.append(len(parts))
                        texts.append(piece)
                        parts.append(_NO_IDS)
                        segment_of_part.append(num_segments)
                        is_beginning = False
                num_segments += 1
        is_plain = np.zeros(len(parts), dtype=np.bool_)
        for (parse_special, is_beginning), (positions, texts) in queues.items():
            is_plain[positions] = not parse_special
            backend = self._backend(parse_special, is_beginning)
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            for position, encoding in zip(positions, encodings, strict=True):
                parts[position] = encoding.ids
        part_lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        token_ids = np.fromiter(chain.from_iterable(parts), dtype=np.uint32, count=int(part_lengths.sum()))
        self._check_plain_text(token_ids, np.repeat(is_plain, part_lengths))
        lengths = np.bincount(segment_of_part, weights=part_lengths, minlength=num_segments).astype(np.int64)
        return EncodedSegments(token_ids, lengths)

    def encode_samples(self, samples: Sequence[Sequence[Segment]]) -> EncodedSamples:
        """Encode a batch of samples at once; see `encode`."""
        encoded = self.encode(samples)
        flags = np.array([segment.is_target for sample in samples for segment in sample], dtype=np.bool_)
        segment_bounds = np.concatenate([[0], np.cumsum(encoded.lengths)])
        bounds = segment_bounds[np.cumsum([0, *map(len, samples)])]
        return EncodedSamples(encoded.token_ids, np.repeat(flags, encoded.lengths), bounds)

    def encode_prompt(self, segments: Sequence[Segment]) -> list[int]:
        """Return the token ids of one sample's segments."""
        token_ids: list[int] = self.encode([segments]).token_ids.tolist()
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens spelled out; broken characters become U+FFFD."""
        return self._backend(True, True).decode(list(token_ids), skip_special_tokens=False)

    def count_tokens(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the tokens of each text as ordinary text that continues another, int64, shape [num_texts]."""
        return self.encode([[Segment("", False, False), *(Segment(text, False, False) for text in texts)]]).lengths[1:]

    def _backend(self, parse_special: bool, is_beginning: bool) -> "Tokenizer":
        return (self._parsing if parse_special else self._plain)[0 if is_beginning else 1]

    @cached_property
    def _parsing(self) -> "tuple[Tokenizer, Tokenizer]":
        return _make_backends(self._settings)

    @cached_property
    def _plain(self) -> "tuple[Tokenizer, Tokenizer]":
        """The tokenizer as if it had no control tokens: (for the beginning of a text, for its continuation)."""
        settings = self._settings | {
            "added_tokens": [
                # A spelling nobody writes, so that all other tokens keep their ids.
                token | {"content": f"\ufdd0{token['id']}\ufdd1"} if token["content"] in self.control_tokens else token
                for token in self._settings["added_tokens"]
                if not (token["content"] in self.control_tokens and _is_in_vocabulary(token["content"], self._settings))
            ]
        }
        backends = _make_backends(settings)
        ids = backends[0].get_added_tokens_decoder()
        for token in self._settings["added_tokens"]:
            is_kept = token["content"] not in self.control_tokens
            if is_kept and (token["id"] not in ids or ids[token["id"]].content != token["content"]):
                raise TokenizerError(
                    f"The tokenizer's token {token['content']!r} can't be kept at id {token['id']} apart from its "
                    "control tokens.",
                    "Correct the list of added tokens in its tokenizer.json.",
                )
        return backends

    def _check_plain_text(self, token_ids: npt.NDArray[np.uint32], is_plain: npt.NDArray[np.bool_]) -> None:
        wrong = self._is_control_id[token_ids] & is_plain
        if wrong.any():
            token_id = int(token_ids[wrong.argmax()])
            spelling = next(token for token, known_id in self.control_tokens.items() if known_id == token_id)
            raise TokenizerError(
                f"The tokenizer makes its control token {spelling!r} of ordinary text, so data could steer the model.",
                "Remove that spelling from the data, or correct the vocabulary in tokenizer.json.",
            )


_NO_IDS: list[int] = []
"""Stands for a text until it is encoded."""


def _is_control(content: str, is_special: bool) -> bool:
    return is_special or content in UNMARKED_CONTROL_TOKENS or CONTROL_SPELLING.fullmatch(content) is not None


def _is_in_vocabulary(token: str, settings: Mapping[str, Any]) -> bool:
    vocabulary = settings["model"]["vocab"]
    return token in vocabulary if isinstance(vocabulary, dict) else any(piece == token for piece, _ in vocabulary)


def _find_bos(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return the tokens that the tokenizer itself puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            tokens: list[str] = tokenizer.convert_ids_to_tokens(full[:start])
            return tokens
    raise TokenizerError(
        "The tokenizer gives a text other ids when it adds its special tokens.", "Correct its post-processor."
    )


def _make_backends(settings: dict[str, Any]) -> "tuple[Tokenizer, Tokenizer]":
    """Return a tokenizer for the beginning of a text and one for its continuation; often the same."""
    from tokenizers import Tokenizer

    beginning = Tokenizer.from_str(json.dumps(settings))
    continued = _without_prefixes(settings)
    return beginning, beginning if continued == settings else Tokenizer.from_str(json.dumps(continued))


def _without_prefixes(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {key: _without_prefix(settings[key]) for key in ("normalizer", "pre_tokenizer")}


def _without_prefix(node: Any) -> Any:
    """Return a normalizer or pre-tokenizer that puts no blank before a text."""
    if not isinstance(node, dict):
        return node
    if node.get("type") == "Prepend":
        return None
    changed = dict(node)
    if node.get("type") == "Metaspace":
        changed |= {"prepend_scheme": "never"}
    if "add_prefix_space" in node:
        changed |= {"add_prefix_space": False}
    for key in ("normalizers", "pretokenizers"):
        if key in node:
            changed[key] = [child for child in map(_without_prefix, node[key]) if child is not None]
    return changed


def _cut(text: str) -> Iterator[str]:
    """Yield a long text in pieces that give the same tokens as the whole, where it has line ends."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        found = (cut.search(text, start + PIECE_CHARACTERS // 2, end) for cut in _CUTS)
        end = next((place.start() for place in found if place), end)
        yield text[start:end]
        start = end
    yield text[start:]
