"""Running a model whose weights are not in memory: each module's are read when it runs, and let go after it."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import nn

from dsft.core.host_memory import return_freed_memory
from dsft.merge.structure import ADAPTER_NAME
from dsft.merge.workers import count_workers, run_in_order

ReadRows = Callable[[], torch.Tensor]
"""Reads consecutive rows of a weight, in float32; any thread may call it."""

DivideWeight = Callable[[str], tuple[tuple[int, ...], Iterator[ReadRows]]]
"""Returns, by its name in the model, the shape of a weight and what reads its rows, from first to last."""


class Control(Protocol):
    """Other weights for the second half of a batch, made of those that the first half runs with."""

    @property
    def num_samples(self) -> int:
        """Samples in a half of the batch."""
        ...

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as the second half has it, for modules that only round theirs."""
        ...

    def change(self, unit: nn.Module) -> Callable[..., Any] | None:
        """Change the loaded weights of a module; return what runs it then, None for the module itself."""
        ...

    def restore(self, unit: nn.Module) -> None:
        """Take back what `change` has noted in the module itself."""
        ...


_LARGE_VALUES = 2**22


@dataclass
class Streaming:
    """How a model's weights come to it.

    Attributes:
        divide: Finds its weights.
        device: Where it runs.
        control: What the second half of its batch runs with; None runs the whole batch alike.
    """

    divide: DivideWeight
    device: torch.device
    control: Control | None = None
    _large_weight: torch.Tensor | None = None
    _is_large_weight_taken: bool = False

    def attach(self, model: nn.Module) -> None:
        """Let a model on the meta device read its weights as it runs; buffers that are computed are there."""
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        for path, unit in find_units(model):
            # Linear layers and embeddings are most of a model: their weights need not even be there as a whole.
            inner_path, inner = _find_inner(path, unit)
            run: Callable[..., Any]
            if type(inner) is nn.Linear:
                run = partial(self._run_linear, inner, inner_path)
            elif type(inner) is nn.Embedding:
                run = partial(self._run_embedding, inner, inner_path)
            else:
                run = partial(self._run, unit, path, unit.forward)
            unit.forward = partial(_run_and_clear, run)

    def _run_linear(self, unit: nn.Linear, path: str, states: torch.Tensor) -> torch.Tensor:
        control = self.control
        inputs = [states] if control is None else [_take_half(half, states, control.num_samples) for half in (0, 1)]

        def multiply(read: ReadRows) -> list[torch.Tensor]:
            weight = read().to(self.device)
            weights = [weight] if control is None else [weight, control.round(weight)]
            return [nn.functional.linear(*pair) for pair in zip(inputs, weights, strict=True)]

        # Not put together at the end: small results between large freed pieces would keep those from being used again.
        shape, reads = self.divide(f"{path}.weight")
        outputs = [torch.empty(*each.shape[:-1], shape[0], device=self.device) for each in inputs]
        works = (partial(multiply, read) for read in reads)
        first = 0
        with closing(run_in_order(works, count_workers(self.device.type))) as results:
            for products in results:
                for output, product in zip(outputs, products, strict=True):
                    output[..., first : first + product.shape[-1]] = product
                first += products[0].shape[-1]
        if unit.bias is not None:
            bias = self._read(f"{path}.bias")
            biases = [bias] if control is None else [bias, control.round(bias)]
            outputs = [output + each for output, each in zip(outputs, biases, strict=True)]
        if control is None:
            return outputs[0]
        joined: torch.Tensor = _join_halves(outputs[0], outputs[1], control.num_samples)
        return joined

    def _run_embedding(self, unit: nn.Embedding, path: str, indices: torch.Tensor) -> torch.Tensor:
        shape, reads = self.divide(f"{path}.weight")
        embedded = torch.empty(*indices.shape, shape[1], device=self.device)
        first = 0
        with closing(run_in_order(reads, count_workers(self.device.type))) as pieces:
            for rows in pieces:
                is_here = (indices >= first) & (indices < first + len(rows))
                embedded[is_here] = rows.to(self.device)[indices[is_here] - first]
                first += len(rows)
        if self.control is None:
            return embedded
        num_samples = self.control.num_samples
        first_half, second_half = (_take_half(half, embedded, num_samples) for half in (0, 1))
        joined: torch.Tensor = _join_halves(first_half, self.control.round(second_half), num_samples)
        return joined

    def _run(self, unit: nn.Module, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loaded = self._load(unit, path)
        try:
            if self.control is None:
                return forward(*args, **kwargs)
            return _run_halves(unit, forward, self.control, args, kwargs)
        finally:
            for holder, name, placeholder in loaded:
                holder[name] = placeholder
            self._is_large_weight_taken = False

    def _load(self, unit: nn.Module, path: str) -> list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
        loaded: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
        for inner, module in unit.named_modules():
            if "original_module" in inner.split("."):
                continue  # PEFT keeps it beside the one that runs
            for holder in (module._parameters, module._buffers):
                for name, tensor in holder.items():
                    if tensor is None or not tensor.is_meta or name in module._non_persistent_buffers_set:
                        continue
                    weight = self._read(".".join(part for part in (path, inner, name) if part))
                    loaded.append((holder, name, tensor))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    holder[name] = nn.Parameter(weight, requires_grad=False) if is_parameter else weight
        return loaded

    def _read(self, name: str) -> torch.Tensor:
        shape, reads = self.divide(name)
        whole = self._allocate(shape)
        first = 0
        with closing(run_in_order(reads, count_workers(self.device.type))) as pieces:
            for rows in pieces:
                if not shape:
                    return whole.copy_(rows)
                whole[first : first + len(rows)] = rows
                first += len(rows)
        return whole

    def _allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return memory for a weight; one large weight at a time lies where the last one was.

        The system hands out memory slower than it is filled from files.
        """
        num_values = prod(shape)
        if num_values < _LARGE_VALUES or self._is_large_weight_taken:
            return torch.empty(shape, device=self.device)
        if self._large_weight is None or len(self._large_weight) < num_values:
            self._large_weight = None
            self._large_weight = torch.empty(num_values, device=self.device)
        self._is_large_weight_taken = True
        return self._large_weight[:num_values].view(shape)


def find_units(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that hold weights of their own or are PEFT's, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or any(tensor.is_meta for tensor in own):
        yield path, module
        return
    for name, child in module.named_children():
        yield from find_units(child, f"{path}.{name}" if path else name)


def _find_inner(path: str, unit: nn.Module) -> tuple[str, nn.Module]:
    """Return the module that runs in the place of one that an adapter holds whole."""
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(unit, ModulesToSaveWrapper):
        return path, unit
    return f"{path}.modules_to_save.{ADAPTER_NAME}", unit.modules_to_save[ADAPTER_NAME]


def _run_and_clear(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return run(*args, **kwargs)
    finally:
        return_freed_memory()


def _run_halves(
    unit: nn.Module, forward: Callable[..., Any], control: Control, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    (first_args, first_kwargs), (second_args, second_kwargs) = (
        (
            _take_half(half, args, control.num_samples),
            {name: _take_half(half, value, control.num_samples) for name, value in kwargs.items()},
        )
        for half in (0, 1)
    )
    first = forward(*first_args, **first_kwargs)
    changed = control.change(unit) or forward
    try:
        second = changed(*second_args, **second_kwargs)
    finally:
        control.restore(unit)
    return _join_halves(first, second, control.num_samples)


def _take_half(half: int, value: Any, num_samples: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_take_half(half, each, num_samples) for each in value)
    # What is the same for every sample, such as positions, comes as a batch of one.
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 2 * num_samples:
        return value.chunk(2)[half]
    return value


def _join_halves(first: Any, second: Any, num_samples: int) -> Any:
    if isinstance(first, tuple):
        return tuple(_join_halves(*each, num_samples) for each in zip(first, second, strict=True))
    if not isinstance(first, torch.Tensor):
        return first
    return torch.cat([each.expand(num_samples, *each.shape[1:]) for each in (first, second)])
