"""One pass of some tokens through a model, each with its place in a cache: the same for answers, drafts and prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch.nn import functional

from dsft.infer.decoding.cuda import attention_kernels, block_kernels
from dsft.infer.decoding.cuda.products import MAX_FEW_TOKENS, FusedLinear, Product
from dsft.infer.decoding.cuda.weights import BlockWeights, ModelWeights

_KEY_BLOCK = 64
# Numbers that a program takes. A few tokens keep a card busy by many small programs, above all with an adapter, where
# each number is a short sum over ranks.
_GATE_BLOCK = 8
_PLAIN_GATE_BLOCK = 64
_UPDATE_BLOCK = 8
_ROTATION_BLOCK = 16
_NUM_WARPS = 2
_MANY_WARPS = 4


@dataclass(frozen=True)
class Cache:
    """Keys and values of all blocks.

    Attributes:
        keys: [num_blocks, num_slots, num_kv_heads, capacity, head_size].
        values: The same.
        cosines: [capacity, head_size], as transformers' module gives them.
        sines: The same.
    """

    keys: torch.Tensor
    values: torch.Tensor
    cosines: torch.Tensor
    sines: torch.Tensor

    @property
    def num_slots(self) -> int:
        """Texts that it holds."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens of each text that it holds."""
        return self.keys.shape[3]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a pass.

    Attributes:
        ids: int64 [T].
        positions: int32 [T], place of each in its text.
        slots: int32 [T], its text.
        stretches: Of a pass of whole prompts, the slot, first position and number of tokens of each; empty for single
            tokens, which attend one by one.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    stretches: tuple[tuple[int, int, int], ...] = ()


def make_cache(weights: ModelWeights, num_slots: int, capacity: int) -> Cache:
    """Return an empty cache on the weights' device."""
    embedding = weights.embedding
    shape = (len(weights.blocks), num_slots, weights.num_kv_heads, capacity, weights.head_size)
    positions = torch.arange(capacity, device=embedding.device)[None]
    with torch.no_grad():
        cosines, sines = weights.rotary(embedding[:1, None], positions)  # its first argument names the type alone
    keys, values = (torch.empty(shape, dtype=embedding.dtype, device=embedding.device) for _ in range(2))
    return Cache(keys, values, cosines[0].contiguous(), sines[0].contiguous())


class Passes:
    """Passes through a model.

    Args:
        weights: The model.
        cache: Where keys and values are.
        is_adapted: Whether the adapter takes part.
    """

    def __init__(self, weights: ModelWeights, cache: Cache, is_adapted: bool) -> None:
        self._weights = weights
        self._cache = cache
        self._is_adapted = is_adapted

    @torch.no_grad()
    def read(self, tokens: Tokens, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Read tokens into the cache.

        Args:
            tokens: The tokens.
            wanted: int64, indices of the tokens after which logits are wanted; None is all.

        Returns:
            Logits, float32 [num_wanted, vocab_size].
        """
        weights = self._weights
        residual = functional.embedding(tokens.ids, weights.embedding)
        delta: Product | None = None
        for index, block in enumerate(weights.blocks):
            states = self._normalize(residual, delta, block.input_norm)
            attended = self._attend(index, block, states, tokens)
            delta = self._add(residual, block.attention_output, attended)
            states = self._normalize(residual, delta, block.mlp_norm)
            gated = self._gate(block.mlp_input, states)
            delta = self._add(residual, block.mlp_output, gated)
        states = self._normalize(residual, delta, weights.norm)
        if wanted is not None:
            states = states[wanted]
        return functional.linear(states, weights.head).float()

    def _multiply(self, linear: FusedLinear, states: torch.Tensor) -> Product:
        if len(states) <= MAX_FEW_TOKENS:
            return linear.multiply(states, self._is_adapted)
        return linear.multiply_many(states, self._is_adapted)

    def _normalize(self, residual: torch.Tensor, delta: Product | None, weight: torch.Tensor) -> torch.Tensor:
        num_tokens, hidden_size = residual.shape
        out = torch.empty_like(residual)
        parts = residual[None] if delta is None else delta.parts
        block_kernels.add_and_normalize[(num_tokens,)](
            residual, parts, weight, out, parts.stride(0), self._weights.eps, hidden_size,
            HAS_DELTA=delta is not None, NUM_PARTS=len(parts), BLOCK=triton.next_power_of_2(hidden_size), num_warps=16,
        )  # fmt: skip
        return out

    def _add(self, residual: torch.Tensor, linear: FusedLinear, states: torch.Tensor) -> Product | None:
        """Add a layer's result to the residual stream, or leave that to the norm that comes next."""
        product = self._multiply(linear, states)
        if product.lowered is None:
            return product
        lowered, rows_b, rank = self._left_over(linear, product)
        num_tokens, hidden_size = residual.shape
        block_kernels.add_updated[(triton.cdiv(hidden_size, _UPDATE_BLOCK), num_tokens)](
            residual, product.parts, lowered, rows_b, product.parts.stride(0), lowered.stride(0), hidden_size, rank,
            NUM_PARTS=len(product.parts), NUM_LOWERED_PARTS=len(lowered), RANK=rank, BLOCK=_UPDATE_BLOCK,
            num_warps=_NUM_WARPS,
        )  # fmt: skip
        return None

    def _gate(self, linear: FusedLinear, states: torch.Tensor) -> torch.Tensor:
        product = self._multiply(linear, states)
        num_tokens, width = len(states), linear.width // 2
        out = torch.empty(num_tokens, width, dtype=states.dtype, device=states.device)
        lowered, rows_b, rank = self._left_over(linear, product)
        block_size = _GATE_BLOCK if rank else _PLAIN_GATE_BLOCK
        num_warps = _NUM_WARPS if num_tokens <= MAX_FEW_TOKENS else _MANY_WARPS
        block_kernels.gate[(triton.cdiv(width, block_size), num_tokens)](
            product.parts, lowered, rows_b, out, product.parts.stride(0), lowered.stride(0), width, 2 * rank,
            NUM_PARTS=len(product.parts), NUM_LOWERED_PARTS=len(lowered), RANK=rank,
            BLOCK=block_size, num_warps=num_warps,
        )  # fmt: skip
        return out

    def _attend(self, index: int, block: BlockWeights, states: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return what the heads of a block give, [T, num_heads * head_size]; keys and values go into the cache."""
        weights, cache = self._weights, self._cache
        num_heads, num_kv_heads, size = weights.num_heads, weights.num_kv_heads, weights.head_size
        product = self._multiply(block.attention_input, states)
        lowered, rows_b, rank = self._left_over(block.attention_input, product)
        queries = torch.empty(len(states), num_heads, size, dtype=states.dtype, device=states.device)
        keys, values = cache.keys[index], cache.values[index]
        has_norm = block.query_norm is not None
        query_norm = states if block.query_norm is None else block.query_norm
        key_norm = states if block.key_norm is None else block.key_norm
        chunk = size // 2 if has_norm or len(states) > MAX_FEW_TOKENS else min(_ROTATION_BLOCK, size // 2)
        block_kernels.rotate_and_store[(num_heads + 2 * num_kv_heads, len(states), size // 2 // chunk)](
            product.parts, lowered, rows_b, cache.cosines, cache.sines, tokens.positions, tokens.slots, query_norm,
            key_norm, queries, keys, values, product.parts.stride(0), lowered.stride(0), weights.eps, num_heads,
            num_kv_heads, cache.capacity, 3 * rank, HAS_NORM=has_norm, SIZE=size, CHUNK=chunk,
            NUM_PARTS=len(product.parts), NUM_LOWERED_PARTS=len(lowered), RANK=rank, num_warps=_NUM_WARPS,
        )  # fmt: skip
        if tokens.stretches:
            return self._attend_in_stretches(queries, keys, values, tokens.stretches)
        return self._attend_one_by_one(queries, keys, values, tokens)

    def _attend_one_by_one(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: Tokens
    ) -> torch.Tensor:
        num_tokens, num_heads, size = queries.shape
        num_kv_heads = self._weights.num_kv_heads
        num_parts = _choose_parts(num_tokens * num_kv_heads)
        shape = (num_tokens, num_heads, num_parts)
        partial = torch.empty(*shape, size, dtype=torch.float32, device=queries.device)
        maxima, sums = (torch.empty(shape, dtype=torch.float32, device=queries.device) for _ in range(2))
        num_grouped = num_heads // num_kv_heads
        attention_kernels.attend_to_parts[(num_tokens, num_kv_heads, num_parts)](
            queries, keys, values, tokens.positions, tokens.slots, partial, maxima, sums, size**-0.5, num_heads,
            num_kv_heads, self._cache.capacity, NUM_PARTS=num_parts, NUM_GROUPED=num_grouped, SIZE=size,
            BLOCK_G=max(16, triton.next_power_of_2(num_grouped)), BLOCK_K=_KEY_BLOCK, num_warps=4,
        )  # fmt: skip
        out = torch.empty_like(queries)
        attention_kernels.join_parts[(num_tokens, num_heads)](
            partial, maxima, sums, out, num_heads, NUM_PARTS=num_parts, SIZE=size, num_warps=2
        )
        return out.view(num_tokens, num_heads * size)

    def _attend_in_stretches(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        stretches: Sequence[tuple[int, int, int]],
    ) -> torch.Tensor:
        from torch.nn.attention.bias import causal_lower_right

        num_grouped = self._weights.num_heads // self._weights.num_kv_heads
        outputs = []
        first = 0
        for slot, position, length in stretches:
            query = queries[first : first + length].transpose(0, 1)[None]
            key, value = (
                states[slot : slot + 1, :, : position + length].repeat_interleave(num_grouped, dim=1)
                if num_grouped > 1
                else states[slot : slot + 1, :, : position + length]
                for states in (keys, values)
            )
            mask = causal_lower_right(length, position + length) if position else None
            attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=not position)
            outputs.append(attended[0].transpose(0, 1).reshape(length, -1))
            first += length
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _left_over(self, linear: FusedLinear, product: Product) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return A x, B and the rank where the adapter's part is still to be added; else a rank of 0."""
        update = linear.update(self._is_adapted)
        if product.lowered is None or update is None:
            return product.parts[:1], product.parts, 0
        return product.lowered, update.rows_b, update.rank


def _choose_parts(num_programs: int) -> int:
    """Return into how many parts the keys are cut, so that a card with some hundred programs at once is busy."""
    return int(min(32, max(2, triton.next_power_of_2(triton.cdiv(512, num_programs)))))
