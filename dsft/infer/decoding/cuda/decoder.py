"""The decoder for Llama-like models on CUDA: passes of a few tokens recorded once as CUDA graphs, then replayed."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from triton.errors import TritonError

from dsft.core.signals import held_signals
from dsft.infer.decoding.cuda.passes import Cache, Passes, Tokens, make_cache
from dsft.infer.decoding.cuda.products import MAX_FEW_TOKENS
from dsft.infer.decoding.cuda.weights import ModelWeights, UnsupportedModelError, take_apart

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_MAX_ROWS = 32
_CAPACITY_STEP = 512
_MAX_PASS_TOKENS = 4096
"""Of a prompt that is read at once; longer ones are read in several passes, which takes less memory."""

_RECORDED_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    tokens: Tokens
    logits: torch.Tensor  # [T, vocab_size]


class CudaDecoder:
    """See `Decoder`.

    Args:
        model: The model, in evaluation mode, on a CUDA device.

    Raises:
        UnsupportedModelError: A model that it does not run exactly.
    """

    def __init__(self, model: "PreTrainedModel | PeftModel") -> None:
        self._weights: ModelWeights = take_apart(model)
        self._max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._cache: Cache | None = None
        self._is_adapted = True
        self._texts: list[list[int]] = []  # what was read, row by row
        self._slots: list[int] = []  # where each row's keys are
        self._recordings: dict[int, _Recording] = {}
        _try_passes(self._weights)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._weights.embedding.device

    @property
    def max_rows(self) -> int:
        """Most texts at once."""
        return _MAX_ROWS

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor:
        """Read prompts; see `Decoder`."""
        # One place more than asked for: a row that has ended reads on until the others have.
        needed = max(map(len, prompts)) + max_new_tokens + 1
        num_common = self._find_common(prompts[0]) if len(prompts) == 1 else 0
        num_common = num_common if self._make_room(len(prompts), needed) else 0
        self._texts = [list(prompt) for prompt in prompts]
        self._slots = list(range(len(prompts)))
        logits = []
        for group in _group_prompts(prompts):
            logits.append(self._read_prompts([(row, num_common) for row in group]))
        return torch.cat(logits)

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Read one more token in each row; see `Decoder`."""
        positions = [len(text) for text in self._texts]
        for text in self._texts:
            text.append(-1)  # the device alone knows it so far
        recording = self._record(len(self._texts))
        num_rows = len(self._texts)
        recording.tokens.ids[:num_rows] = token_ids
        self._place(recording, positions, self._slots)
        recording.graph.replay()
        return recording.logits[:num_rows]

    def extend(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read several tokens of the only row; see `Decoder`."""
        [text], [slot] = self._texts, self._slots
        first, num_tokens = len(text), len(token_ids)
        text.extend(token_ids)
        recording = self._record(num_tokens)
        recording.tokens.ids[:num_tokens] = torch.tensor(list(token_ids), dtype=torch.int64).to(
            self.device, non_blocking=True
        )
        self._place(recording, list(range(first, first + num_tokens)), [slot] * num_tokens)
        recording.graph.replay()
        return recording.logits[:num_tokens]

    def know(self, token_ids: Sequence[int]) -> None:
        """Take note of what was read last; see `Decoder`."""
        for text, token_id in zip(self._texts, token_ids, strict=True):
            text[-1] = token_id

    def rewind(self, num_tokens: int) -> None:
        """Forget the last tokens of the only row; see `Decoder`."""
        if num_tokens:
            del self._texts[0][-num_tokens:]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone; see `Decoder`. Keys stay where they are."""
        self._texts = [self._texts[row] for row in rows]
        self._slots = [self._slots[row] for row in rows]

    def reset(self) -> None:
        """Forget everything, and give its memory back; see `Decoder`."""
        self._texts, self._slots = [], []
        self._recordings.clear()
        self._cache = None

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Let the base model alone compute for a while; see `Decoder`."""
        self._change(is_adapted=False)
        try:
            yield
        finally:
            self._change(is_adapted=True)

    def _change(self, *, is_adapted: bool) -> None:
        self.reset()
        self._is_adapted = is_adapted

    def _find_common(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt the only row begins with and has read as they are."""
        if len(self._texts) != 1 or self._slots != [0]:
            return 0
        text = self._texts[0]
        num_common = 0
        limit = min(len(text), len(prompt) - 1)  # the last token is read again: its logits are wanted
        while num_common < limit and text[num_common] == prompt[num_common]:
            num_common += 1
        return num_common

    def _make_room(self, num_rows: int, num_tokens: int) -> bool:
        """Make a cache that is large enough; return whether the one that was there stays."""
        cache = self._cache
        if cache is not None and cache.num_slots >= num_rows and cache.capacity >= num_tokens:
            return True
        self._recordings.clear()
        # A conversation grows with each turn: the second time there is room for the next ones too.
        wanted = num_tokens if cache is None or num_rows > 1 else 2 * num_tokens
        if self._max_positions is not None:
            wanted = max(num_tokens, min(wanted, self._max_positions + 1))
        self._cache = cache = None  # its memory is needed for the new one
        try:
            self._cache = make_cache(self._weights, num_rows, _round_up(wanted))
        except torch.OutOfMemoryError:
            if wanted == num_tokens:
                raise
            self._cache = make_cache(self._weights, num_rows, _round_up(num_tokens))
        return False

    def _held(self) -> Cache:
        if self._cache is None:
            raise RuntimeError("nothing was started")
        return self._cache

    def _passes(self) -> Passes:
        return Passes(self._weights, self._held(), self._is_adapted)

    def _read_prompts(self, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Read the texts of rows from a position on; return the logits after each, [num_rows, vocab_size]."""
        if len(rows) == 1:
            [(row, first)] = rows
            text = self._texts[row]
            while len(text) - first > _MAX_PASS_TOKENS:
                self._read([(row, first, first + _MAX_PASS_TOKENS)])
                first += _MAX_PASS_TOKENS
            return self._read([(row, first, len(text))])
        return self._read([(row, first, len(self._texts[row])) for row, first in rows])

    def _read(self, stretches: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        ids = [token for row, first, last in stretches for token in self._texts[row][first:last]]
        positions = [position for _, first, last in stretches for position in range(first, last)]
        slots = [self._slots[row] for row, first, last in stretches for _ in range(first, last)]
        lengths = [last - first for _, first, last in stretches]
        device = self.device
        tokens = Tokens(
            ids=torch.tensor(ids, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, dtype=torch.int32, device=device),
            # A few tokens behind many keys are read as single ones.
            stretches=()
            if len(ids) <= MAX_FEW_TOKENS
            else tuple((self._slots[row], first, last - first) for row, first, last in stretches),
        )
        last_ones = torch.tensor(lengths, device=device).cumsum(0) - 1
        return self._passes().read(tokens, last_ones)

    def _record(self, num_tokens: int) -> _Recording:
        """Return a recorded pass of at least so many tokens."""
        size = next(size for size in _RECORDED_SIZES if size >= num_tokens)
        if size not in self._recordings:
            self._recordings[size] = self._make_recording(size)
        return self._recordings[size]

    def _make_recording(self, size: int) -> _Recording:
        passes, cache = self._passes(), self._held()
        device = self.device
        # Tokens that fill up the size read and write the last place of the first text, which no text reaches.
        tokens = Tokens(
            ids=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.full((size,), cache.capacity - 1, dtype=torch.int32, device=device),
            slots=torch.zeros(size, dtype=torch.int32, device=device),
        )
        passes.read(tokens)  # compiles what is still to be compiled, which can't be done while it is recorded
        graph = torch.cuda.CUDAGraph()
        with held_signals(), torch.cuda.graph(graph):  # one that is broken off leaves the stream unusable
            logits = passes.read(tokens)
        return _Recording(graph, tokens, logits)

    def _place(self, recording: _Recording, positions: list[int], slots: list[int]) -> None:
        num_spare = len(recording.tokens.ids) - len(positions)
        last = self._held().capacity - 1
        places = [*positions, *[last] * num_spare, *slots, *[0] * num_spare]
        both = torch.tensor(places, dtype=torch.int32).pin_memory().to(self.device, non_blocking=True)
        recording.tokens.positions.copy_(both[: len(recording.tokens.ids)])
        recording.tokens.slots.copy_(both[len(recording.tokens.ids) :])


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // _CAPACITY_STEP) * _CAPACITY_STEP


def _try_passes(weights: ModelWeights) -> None:
    """Run passes of each kind, which compiles their kernels, in a cache of their own.

    Raises:
        UnsupportedModelError: Triton can't build its kernels here; it needs a C compiler.
    """
    device = weights.embedding.device
    passes = Passes(weights, make_cache(weights, 1, 2 * MAX_FEW_TOKENS), is_adapted=True)
    try:
        for num_tokens in (1, 2, MAX_FEW_TOKENS + 1):
            tokens = Tokens(
                ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
                positions=torch.arange(num_tokens, dtype=torch.int32, device=device),
                slots=torch.zeros(num_tokens, dtype=torch.int32, device=device),
                stretches=((0, 0, num_tokens),) if num_tokens > MAX_FEW_TOKENS else (),
            )
            passes.read(tokens)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, subprocess.CalledProcessError, TritonError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(f"Triton can't build its kernels here ({first_line})") from error


def _group_prompts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the rows in groups of so many tokens as one pass takes; a longer prompt is alone."""
    groups: list[list[int]] = [[]]
    num_tokens = 0
    for row, prompt in enumerate(prompts):
        if groups[-1] and num_tokens + len(prompt) > _MAX_PASS_TOKENS:
            groups.append([])
            num_tokens = 0
        groups[-1].append(row)
        num_tokens += len(prompt)
    return groups
